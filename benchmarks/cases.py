"""What is measured, as data: every suite with its cases.

A new suite is a new entry of `SUITES`; a new thing to run is a new entry of
`yoso_core.benchmarks.contenders.CONTENDERS`.
"""

from dataclasses import dataclass, replace
from typing import Literal

Measure = Literal["speedup", "cost", "bandwidth", "memory", "memory share", "overhead"]


@dataclass(frozen=True)
class Workload:
    """One call: who runs, and on what shapes. The same shapes always mean the same numbers, drawn
    from the standard normal distribution.
    """

    run: str
    """A key of `CONTENDERS`."""
    n: int
    heads: int = 12
    dim: int = 64
    """``d`` and ``d_v`` alike."""
    dtype: str = "float32"
    num_hash: int = 32
    hash_code_len: int = 8
    backward_num_hash: int | None = None
    """Of these hashes alone come the gradients of query and key; ``None``: of all."""
    variant: str | None = None
    """The name of a variant of ours; ``None`` is the automatic choice."""
    batch: int = 1
    device: str = "cpu"
    """A key of `yoso_core.benchmarks.machines.MACHINES`."""


@dataclass(frozen=True)
class Case:
    """One number to measure, and its target."""

    suite: str
    name: str
    measure: Measure
    """
    - ``"speedup"``: time of ``beside`` over time of ``ours``, at least ``limit``.
    - ``"cost"``: time of ``ours`` over ``share`` times that of ``beside``, at most ``limit``.
    - ``"bandwidth"``: the time to move inputs and output once, at the rate of large copies, over
      time of ``ours``, at least ``limit``.
    - ``"memory"``: the MB that ``ours`` allocates beyond inputs and output, at most ``limit``.
    - ``"memory share"``: the bytes that ``ours`` allocates beyond inputs and output over those of
      ``beside``, at most ``limit``.
    - ``"overhead"``: time of ``ours`` less that of ``beside``, in microseconds, at most ``limit``.
    """
    ours: Workload
    beside: Workload | None = None
    """The peer on the same tensors, or ours at another size or dtype. The two are measured in
    turns.
    """
    also: tuple[Workload, ...] = ()
    """Others that a reader would ask about: measured in the same turns, without a target. Where one
    is ``beside`` in another dtype, the ratio to the faster of them stands beside the result.
    """
    limit: float | None = None
    aim: float | None = None
    """Better than ``limit``: hoped for, not promised."""
    share: float = 1.0
    """How much more work ``ours`` is than ``beside``."""
    headline: bool = False
    """Stands in the README, which has room for five."""
    quick: bool = False
    """Part of the short run that checks the benchmark itself."""


def _in_bfloat16(softmax: Workload, *lengths: int) -> tuple[Workload, ...]:
    """torch's attention on the same tensors, cast to bfloat16 before the call, at these lengths: a
    reader may take the faster.
    """
    return (replace(softmax, dtype="bfloat16"),) if softmax.n in lengths else ()


def _speedup(n: int, limit: float | None = None, aim: float | None = None) -> Case:
    return Case(
        suite="cpu",
        name=f"sampled, n = {n:,}, beside SDPA",
        measure="speedup",
        ours=Workload("yoso", n),
        beside=Workload("sdpa", n),
        also=_in_bfloat16(Workload("sdpa", n), 512, 4096, 16384),
        limit=limit,
        aim=aim,
        headline=n in (4096, 16384),
        quick=n <= 1024,
    )


def _per_token(n: int) -> Case:
    # There is no peer: its time grows as n squared, to minutes at the first of these sizes and to
    # most of an hour at the second.
    return Case(
        suite="cpu",
        name=f"sampled, n = {n:,}: time per token over that at n = 4,096",
        measure="cost",
        ours=Workload("yoso", n),
        beside=Workload("yoso", 4096),
        share=n / 4096,
        limit=1.3,
    )


def _relative(name: str, ours: Workload, share: float, quick: bool = False) -> Case:
    """Another dtype or dimension beside float32 at d = 64. ``share`` is how much more work it is;
    for the same work twice the time is allowed.
    """
    return Case(
        suite="cpu",
        name=f"sampled, n = 4,096, {name} over {share:g} x float32, d = 64",
        measure="cost",
        ours=ours,
        beside=Workload("yoso", 4096),
        share=share,
        limit=2.0,
        quick=quick,
    )


def _memory(ours: Workload, beside: Workload | None = None, headline: bool = False, quick: bool = False) -> Case:
    kind = "exact expectation" if ours.run == "yoso_expectation" else "sampled"
    return Case(
        suite="cpu",
        name=f"{kind}, n = {ours.n:,}: memory beyond inputs and output",
        measure="memory",
        ours=ours,
        beside=beside,
        limit=64.0,
        headline=headline,
        quick=quick,
    )


def _training(
    n: int,
    limit: float | None = None,
    aim: float | None = None,
    *,
    how: str = "",
    hash_code_len: int = 8,
    backward_num_hash: int | None = None,
) -> Case:
    """``how`` names what is not as usual."""
    ours = Workload("yoso_training", n, hash_code_len=hash_code_len, backward_num_hash=backward_num_hash)
    softmax = replace(ours, run="sdpa_training", backward_num_hash=None)
    return Case(
        suite="cpu",
        name=f"sampled forward + backward, n = {n:,}{how and f', {how}'}, beside SDPA",
        measure="speedup",
        ours=ours,
        beside=softmax,
        also=_in_bfloat16(softmax, 4096),  # at 16,384 a call takes minutes on a processor without such products
        limit=limit,
        aim=aim,
        headline=n == 4096 and not how,
        quick=n <= 1024,
    )


_TINY = Workload("cumulation_operator", 16, heads=1)

TRAINING: tuple[Case, ...] = (
    _training(1024),
    _training(4096, limit=3, aim=8),
    _training(16384, limit=6, aim=30),
    # tau = log2(n): the paper's choice for long inputs.
    _training(16384, limit=8, how="tau = 14", hash_code_len=14),
    # The gradients of query and key from a quarter of the hashes, that of the value from all.
    *(_training(n, limit, how="8 hashes backward", backward_num_hash=8) for n, limit in ((4096, 9), (16384, 22))),
    Case(
        suite="cpu",
        name="exact expectation forward + backward, n = 4,096, beside transformers",
        measure="speedup",
        ours=Workload("yoso_expectation_training", 4096),
        beside=Workload("transformers_expectation_training", 4096),
        limit=6,
    ),
    Case(
        suite="cpu",
        name="sampled forward + backward, n = 65,536: memory beyond inputs, output and gradients",
        measure="memory",
        ours=Workload("yoso_training", 65536),
        limit=256,
    ),
    Case(
        suite="cpu",
        name="lsh_cumulation of 16 tokens: overhead of the torch operator over the bare kernel",
        measure="overhead",
        ours=_TINY,
        beside=replace(_TINY, run="cumulation_kernel"),
        limit=50,
        quick=True,
    ),
)

_EXPECTATION = Workload("yoso_expectation", 4096), Workload("transformers_expectation", 4096)

CPU: tuple[Case, ...] = (
    _speedup(512, limit=1.5, aim=3),
    _speedup(1024),
    _speedup(2048),
    _speedup(4096, limit=12, aim=20),
    _speedup(8192),
    _speedup(16384, limit=40, aim=80),
    _per_token(65536),
    _per_token(262_144),
    *(
        Case("cpu", f"exact expectation, n = {n:,}, beside transformers", "speedup", ours, theirs, quick=n == 1024)
        for n in (512, 1024, 2048)
        for ours, theirs in [(Workload("yoso_expectation", n), Workload("transformers_expectation", n))]
    ),
    Case("cpu", "exact expectation, n = 4,096, beside transformers", "speedup", *_EXPECTATION, limit=8, headline=True),
    # A float64 has twice the bytes of a float32. Half types are computed in float32, at its cost.
    _relative("float64", Workload("yoso", 4096, dtype="float64"), share=2),
    _relative("float16", Workload("yoso", 4096, dtype="float16"), share=1, quick=True),
    _relative("bfloat16", Workload("yoso", 4096, dtype="bfloat16"), share=1),
    # The work is that of vectors padded to the next power of two.
    _relative("d = 32", Workload("yoso", 4096, dim=32), share=0.5),
    _relative("d = 80", Workload("yoso", 4096, dim=80), share=2),
    _relative("d = 128", Workload("yoso", 4096, dim=128), share=2),
    _memory(Workload("yoso", 512), Workload("sdpa", 512), quick=True),
    _memory(Workload("yoso", 4096), Workload("sdpa", 4096)),
    _memory(Workload("yoso", 16384), Workload("sdpa", 16384)),
    _memory(Workload("yoso", 65536)),
    _memory(Workload("yoso", 262_144), headline=True),
    _memory(Workload("yoso_expectation", 512), Workload("transformers_expectation", 512)),
    _memory(*_EXPECTATION),
    *TRAINING,
)

GPU_SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_FUSED = ("cupy:shared_table", "cupy:sorted_buckets")
_AIMED = (4096, 16384)


def _on_gpu(run: str, n: int, dtype: str = "float32", variant: str | None = None) -> Workload:
    return Workload(run, n, dtype=dtype, variant=variant, batch=8, device="cuda")


def _softmax(n: int) -> tuple[Workload, ...]:
    """torch's attention in float32, where it takes less than a second, and flash attention in
    float16.
    """
    flash = _on_gpu("flash", n, "float16")
    return (_on_gpu("sdpa", n), flash) if n <= 16384 else (flash,)


def _alone(op: str, run: str, n: int, variant: str, paper: str) -> Case:
    """One operation by itself, beside the paper's kernel for it."""
    ours = _on_gpu(run, n, variant=variant)
    return Case(
        suite="gpu",
        name=f"{op}, n = {n:,}: {variant}" + (f" beside {paper}" if variant != paper else ", as in the paper"),
        measure="speedup",
        ours=ours,
        beside=replace(ours, variant=paper) if variant != paper else None,
        also=_softmax(n),
        quick=n <= 512,
    )


def _beside_the_paper(n: int, variant: str) -> Case:
    aimed = n in _AIMED and variant == _FUSED[0]
    return Case(
        suite="gpu",
        name=f"sampled, n = {n:,}: {variant} beside the paper's algorithm",
        measure="speedup",
        ours=_on_gpu("yoso", n, variant=variant),
        beside=_on_gpu("paper", n),
        also=_softmax(n),
        limit=5 if aimed else None,
        quick=n <= 1024,
    )


def _beside_flash(n: int, variant: str) -> Case:
    aimed = n >= 16384 and variant == _FUSED[0]
    return Case(
        suite="gpu",
        name=f"sampled, float16, n = {n:,}: {variant} beside flash attention",
        measure="speedup",
        ours=_on_gpu("yoso", n, "float16", variant),
        beside=_on_gpu("flash", n, "float16"),
        also=(_on_gpu("paper", n, "float16"),),
        limit=1 if aimed else None,
        quick=n <= 1024,
    )


def _beside_the_table(n: int) -> Case:
    # The stricter comparison: both sides have the faster hash, so it shows what the tables gain.
    return Case(
        suite="gpu",
        name=f"sampled, n = {n:,}: {_FUSED[0]} beside the paper's tables with our hash",
        measure="speedup",
        ours=_on_gpu("yoso", n, variant=_FUSED[0]),
        beside=_on_gpu("paper_tables", n),
        limit=5,
    )


def _bandwidth(n: int, dtype: str) -> Case:
    return Case(
        suite="gpu",
        name=f"sampled, {dtype}, n = {n:,}: share of the bandwidth floor",
        measure="bandwidth",
        ours=_on_gpu("yoso", n, dtype, _FUSED[0]),
        limit=0.5,
    )


def _training_on_gpu(n: int, dtype: str) -> Case:
    ours, flash = _on_gpu("yoso_training", n, dtype, _FUSED[0]), _on_gpu("flash_training", n, "float16")
    half = dtype == "float16"
    return Case(
        suite="gpu",
        name=f"sampled forward + backward, {dtype}, n = {n:,}, beside {'flash attention' if half else 'SDPA'}",
        measure="speedup",
        ours=ours,
        beside=flash if half else replace(ours, run="sdpa_training", variant=None),
        also=() if half else (flash,),
        quick=n <= 512,
    )


def _gpu_memory(n: int, variant: str) -> Case:
    return Case(
        suite="gpu",
        name=f"sampled, n = {n:,}: memory of {variant} beyond inputs and output",
        measure="memory",
        ours=_on_gpu("yoso", n, variant=variant),
        beside=_on_gpu("paper", n),
        also=_softmax(n),
        quick=n <= 4096,
    )


_HASHES = ("cupy:warp_per_vector", "numba_cuda:shared_memory", "cupy:block_per_part")
_CUMULATIONS = ("cupy:shared_table", "cupy:sorted_buckets", "numba_cuda:shared_table", "numba_cuda:global_table", "cupy:global_table")
_WEIGHTED = ("cupy:outer_products", "cupy:sorted_pairs", "numba_cuda:weight_by_weight", "cupy:weight_by_weight")

GPU: tuple[Case, ...] = (
    *(_beside_the_paper(n, variant) for n in GPU_SIZES for variant in _FUSED),
    *(_beside_the_table(n) for n in _AIMED),
    *(_beside_flash(n, variant) for n in GPU_SIZES for variant in _FUSED),
    *(_training_on_gpu(n, dtype) for n in (512, *_AIMED) for dtype in ("float16", "float32")),
    *(_bandwidth(n, dtype) for n in _AIMED for dtype in ("float32", "float16")),
    *(_gpu_memory(n, variant) for n in (4096, 16384, 65536) for variant in _FUSED),
    *(_alone("fast_hash", "hash", n, variant, _HASHES[-1]) for n in (512, 4096) for variant in _HASHES),
    *(_alone("lsh_cumulation", "cumulation", n, variant, _CUMULATIONS[-1]) for n in (512, 4096, 16384) for variant in _CUMULATIONS),
    *(_alone("lsh_weighted_cumulation", "weighted", n, variant, _WEIGHTED[-1]) for n in (512, 4096) for variant in _WEIGHTED),
    *(
        Case(
            suite="gpu",
            name=f"exact expectation, n = {n:,}: cupy:blocked beside SDPA",
            measure="speedup",
            ours=_on_gpu("yoso_expectation", n, variant="cupy:blocked"),
            beside=_on_gpu("sdpa", n),
            also=(_on_gpu("transformers_expectation", n), _on_gpu("flash", n, "float16")),
            quick=n <= 512,
        )
        for n in (512, 4096)
    ),
)


def _layer(run: str, n: int) -> Workload:
    """A workload with the numbers that the model's configuration has by default."""
    return Workload(run, n, num_hash=64, hash_code_len=9)


def _model(kind: str, n: int, *, training: bool = False, limit: float | None = None, quick: bool = False) -> Case:
    step = "_training" if training else ""
    return Case(
        suite="model",
        name=f"one layer, {kind}, {'forward + backward, ' if training else ''}n = {n:,}, beside transformers",
        measure="speedup",
        ours=_layer(f"yoso_model{'_expectation' if kind == 'exact expectation' else ''}{step}", n),
        beside=_layer(f"transformers_model{step}", n),
        # The layer takes at least this, however fast its attention is.
        also=(_layer("dense_layers", n),) if not training else (),
        limit=limit,
        quick=quick,
    )


def _model_memory(kind: str, n: int) -> Case:
    return replace(
        _model(kind, n, limit=1 / 3),
        name=f"one layer, {kind}, n = {n:,}: memory beyond weights, input and output over transformers'",
        measure="memory share",
        also=(),
    )


MODEL: tuple[Case, ...] = (
    *(_model(kind, n, quick=n == 512) for kind in ("sampled", "exact expectation") for n in (512, 1024)),
    _model("sampled", 4096, limit=15),
    _model("exact expectation", 4096, limit=7),
    _model_memory("sampled", 4096),
    _model_memory("exact expectation", 4096),
    _model("sampled", 1024, training=True, limit=3),
    _model("exact expectation", 1024, training=True),
    _model("sampled", 4096, training=True),
    _model("exact expectation", 4096, training=True),
)


@dataclass(frozen=True)
class Suite:
    """Cases that are run together, and what the results say about all of them."""

    cases: tuple[Case, ...]
    inputs: str
    """The input of a call, for the settings in the results."""
    sampled: str
    """What a sampled call includes, for the settings in the results."""
    picture: bool = True
    """Draw time and memory against n. A suite of few sizes makes no picture."""


_INPUTS = "batch x heads x n x d, standard normal, torch tensors"
_SAMPLED = "the whole forward pass: hash both sides, cumulate, normalize; signs drawn"

SUITES: dict[str, Suite] = {
    "cpu": Suite(CPU, inputs=f"{_INPUTS}, device cpu", sampled=f"{_SAMPLED} outside"),
    "gpu": Suite(GPU, inputs=f"{_INPUTS}, device cuda", sampled=f"{_SAMPLED} outside"),
    "model": Suite(MODEL, inputs="batch x n tokens, evenly drawn", sampled=f"{_SAMPLED} inside", picture=False),
}
