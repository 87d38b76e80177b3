"""The operators ``torch.ops.yoso_core.*``: registered as the compiler needs them, with the face's
results, errors and gradients.
"""

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support import needs_torch_compiler
from torch import Tensor

import yoso_core
from yoso_core import registry
from yoso_core.model import ops

OPS = torch.ops.yoso_core
N_Q, N_K, D, D_V, M, TAU = 5, 7, 6, 4, 3, 3
LEADING = (2, 2)

TRANSFORM = ["hadamard_transform"]
HASHES = ["fast_hash", "hyperplane_hash"]
CUMULATIONS = ["lsh_cumulation", "lsh_weighted_cumulation"]
BACKWARD = ["expectation_attention_backward", "lsh_attention_backward", "yoso_attention_backward"]
EVERY = [*TRANSFORM, *HASHES, *CUMULATIONS, "expectation_attention", "yoso_attention", *BACKWARD]


def arguments(op: str, dtype: torch.dtype = torch.float32, *, masked: bool = True, requires_grad: bool = False) -> dict[str, Any]:
    """A good call by keywords."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*LEADING, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

    def codes(n: int) -> Tensor:
        return torch.randint(0, 1 << TAU, (*LEADING, n, M), generator=generator, dtype=torch.int32)

    def mask(n: int) -> Tensor | None:
        return torch.rand(*LEADING, n, generator=generator) > 0.3 if masked else None

    query, key, value, grad_out = normal(N_Q, D), normal(N_K, D), normal(N_K, D_V), normal(N_Q, D_V)
    signs = torch.from_numpy(yoso_core.sample_signs(M, TAU, D, batch_shape=LEADING[-1:], rng=0))
    planes = torch.from_numpy(yoso_core.sample_planes(M, TAU, D, batch_shape=LEADING[-1:], rng=0))
    numbers = {"num_hash": M, "hash_code_len": TAU}
    masks = {"query_mask": mask(N_Q), "key_mask": mask(N_K)}
    coded = {"query_hash_code": codes(N_Q), "key_hash_code": codes(N_K), "value": value, "hashtable_capacity": 1 << TAU, **masks}
    vectors = {"query": query, "key": key, "value": value}
    length = torch.rand(*LEADING, N_Q, 1, generator=generator).to(torch.promote_types(dtype, torch.float32))
    in_buckets = {"grad_out": grad_out, **vectors, "query_hash_code": codes(N_Q), "key_hash_code": codes(N_K)}
    return {
        "hadamard_transform": {"x": normal(N_Q, 8)},
        "fast_hash": {"vectors": query, "signs": signs, **numbers},
        "hyperplane_hash": {"vectors": query, "planes": planes, **numbers},
        "lsh_cumulation": coded,
        "lsh_weighted_cumulation": {**coded, "query_weight": query, "key_weight": key},
        "expectation_attention": {**vectors, "hash_code_len": TAU, **masks},
        "expectation_attention_backward": {"grad_out": grad_out, **vectors, "hash_code_len": TAU, **masks},
        "lsh_attention_backward": {**in_buckets, "hash_code_len": TAU, **masks},
        "yoso_attention": {**vectors, "signs": signs, "planes": None, **masks, **numbers},
        "yoso_attention_backward": {
            **{"grad_out": grad_out, "out": normal(N_Q, D_V), "length": length, **vectors, "signs": signs, "planes": None},
            **{
                **masks,
                **numbers,
                "by_expectation": False,
                "normalize_output": True,
                "grad": "lower_bound",
                "layout": "chained",
                "oversample": 0,
                "backward_num_hash": None,
                "variant": None,
            },
        },
    }[op]


def check_registration(op: str, call: dict[str, Any]) -> None:
    torch.library.opcheck(getattr(OPS, op).default, (), call)


@needs_torch_compiler
@pytest.mark.parametrize("op", EVERY)
def test_opcheck(op: str) -> None:
    check_registration(op, arguments(op, requires_grad=op not in BACKWARD))


@needs_torch_compiler
@pytest.mark.slow
@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck_in_other_dtypes_and_without_masks(op: str, dtype: torch.dtype) -> None:
    check_registration(op, arguments(op, dtype, masked=False))


MODES: list[dict[str, Any]] = [
    {"grad": "exact"},
    {"use_expectation": True},
    {"use_expectation": True, "grad": "exact", "normalize_output": False},
    {"backward": "expectation"},
    {"normalize_output": False},
]


@needs_torch_compiler
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(f"{k}_{v}" for k, v in mode.items()))
def test_opcheck_of_attention_in_every_mode(mode: dict[str, Any]) -> None:
    check_registration("yoso_attention", arguments("yoso_attention", requires_grad=True) | mode)


@needs_torch_compiler
def test_opcheck_of_attention_by_planes_and_without_gradients() -> None:
    planes = arguments("hyperplane_hash")["planes"]
    check_registration("yoso_attention", arguments("yoso_attention", requires_grad=True) | {"signs": None, "planes": planes})
    check_registration("yoso_attention", arguments("yoso_attention"))


def test_opcheck_rejects_an_operator_that_tells_the_compiler_a_wrong_shape() -> None:
    wrong = torch.library.custom_op("yoso_core_tests::wrong_shape", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor")
    wrong.register_fake(lambda x: x.new_empty(x.shape[:-1]))
    with pytest.raises(Exception, match="wrong_shape"):
        torch.library.opcheck(wrong, (torch.ones(2, 3),))


# Results


@pytest.mark.parametrize("op", [op for op in EVERY if not op.startswith("yoso_attention")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_an_operator_returns_what_the_face_does(op: str, dtype: torch.dtype) -> None:
    call = arguments(op, dtype)
    got, expected = getattr(OPS, op)(**call), getattr(yoso_core, op)(**call)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("use_expectation", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_attention_returns_what_the_face_does(dtype: torch.dtype, use_expectation: bool) -> None:
    """The same bits, and the length of every row before it was scaled."""
    call = arguments("yoso_attention", dtype) | {"use_expectation": use_expectation}
    expected = yoso_core.yoso_attention(**call)
    out, length = OPS.yoso_attention(**call)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    wide = {name: call[name].to(length.dtype) for name in ("query", "key", "value")}
    rows = yoso_core.yoso_attention(**call | wide, normalize_output=False)
    torch.testing.assert_close(length, torch.linalg.vector_norm(rows, dim=-1, keepdim=True), rtol=1e-6, atol=0)
    out, length = OPS.yoso_attention(**call, normalize_output=False)
    torch.testing.assert_close(out, yoso_core.yoso_attention(**call, normalize_output=False), rtol=0, atol=0)
    assert length.numel() == 0


@pytest.mark.parametrize("op", EVERY)
def test_shapes_without_numbers(op: str) -> None:
    """On the meta device, as the compiler sees them."""
    call = arguments(op)
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in call.items()}
    real, shapes = getattr(OPS, op)(**call), getattr(OPS, op)(**meta)
    for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (real, shapes)), strict=True):
        assert (x.shape, x.dtype, x.stride(), y.device.type) == (y.shape, y.dtype, y.stride(), "meta")


@pytest.mark.parametrize("op", [op for op in EVERY if op not in BACKWARD])
def test_the_variant_named_is_the_one_that_runs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    call_kernel = registry.Kernel.call

    def recording(kernel: registry.Kernel, *args: Any) -> Any:
        ran.append(kernel.name)
        return call_kernel(kernel, *args)

    monkeypatch.setattr(registry.Kernel, "call", recording)
    for variant in yoso_core.variants(op):
        if variant.available and variant.where in ("numpy", "cpu"):
            getattr(OPS, op)(**arguments(op), variant=variant.name)
            assert ran.pop() == variant.name


@pytest.mark.parametrize("op", ["fast_hash", "lsh_cumulation", "expectation_attention", "expectation_attention_backward", "yoso_attention"])
def test_kernels_work_on_the_tensors_own_memory(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = arguments(op)
    tensors = [x for x in call.values() if isinstance(x, Tensor)]
    seen: list[Any] = []
    load = registry.Kernel.load

    def loading(kernel: registry.Kernel) -> Any:
        function = load(kernel)

        def looked_at(*args: Any, **options: Any) -> Any:
            seen.extend(x for x in (*args, *options.values()) if isinstance(x, np.ndarray))
            return function(*args, **options)

        return looked_at

    monkeypatch.setattr(registry.Kernel, "load", loading)
    getattr(OPS, op)(**call)
    assert len(seen) == len(tensors)
    for x in tensors:
        assert any(np.shares_memory(x.numpy(), y) for y in seen)


# Gradients


def test_the_gradient_of_a_cumulation_is_its_derivative() -> None:
    call = arguments("lsh_cumulation", torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: OPS.lsh_cumulation(**call | {"value": value}), (call["value"],), check_grad_dtypes=True)
    assert torch.autograd.gradgradcheck(lambda value: OPS.lsh_cumulation(**call | {"value": value}), (call["value"],))


@pytest.mark.slow
def test_the_gradients_of_a_weighted_cumulation_are_its_derivatives() -> None:
    call = arguments("lsh_weighted_cumulation", torch.float64, requires_grad=True)

    def weighted(a: Tensor, b: Tensor, value: Tensor) -> Tensor:
        result: Tensor = OPS.lsh_weighted_cumulation(**call | {"query_weight": a, "key_weight": b, "value": value})
        return result

    inputs = (call["query_weight"], call["key_weight"], call["value"])
    assert torch.autograd.gradcheck(weighted, inputs)
    assert torch.autograd.gradgradcheck(weighted, inputs)
    call["key_weight"] = call["key_weight"].detach()
    (grad,) = torch.autograd.grad(weighted(*inputs[:1], call["key_weight"], call["value"].detach()).sum(), inputs[:1])
    assert grad.any()


def separated(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries and keys whose cosines lie within 0.99: nearer the ends the derivative runs off to
    infinity.
    """
    while True:
        query, key = (torch.randn(2, n, 3, generator=generator, dtype=torch.float64) for n in (N_Q, N_K))
        cosine = torch.nn.functional.normalize(query, dim=-1) @ torch.nn.functional.normalize(key, dim=-1).mT
        if cosine.abs().max() <= 0.99:
            return query.requires_grad_(), key.requires_grad_()


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_the_exact_gradient_of_the_expectation_is_its_derivative(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = separated(generator)
    value = torch.randn(2, N_K, D_V, generator=generator, dtype=torch.float64, requires_grad=True)
    sides = (("query_mask", N_Q), ("key_mask", N_K)) if masked else ()
    masks = {name: torch.rand(2, n, generator=generator) > 0.3 for name, n in sides}

    def by(grad: str) -> Any:
        return lambda *inputs: OPS.expectation_attention(*inputs, TAU, **masks, grad=grad)

    assert torch.autograd.gradcheck(by("exact"), (query, key, value))
    lower_bound_passes = torch.autograd.gradcheck(by("lower_bound"), (query, key, value), raise_exception=False)
    assert not lower_bound_passes


@pytest.mark.parametrize("op", ["expectation_attention", "yoso_attention"])
def test_there_is_no_second_derivative(op: str) -> None:
    call = arguments(op, requires_grad=True)
    out = getattr(OPS, op)(**call)
    out = out[0] if isinstance(out, tuple) else out
    (first,) = torch.autograd.grad(out.square().sum(), call["value"], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^yoso_core::{op}: there is no second derivative; take first"):
        first.sum().backward()


def test_hashes_have_no_gradients() -> None:
    for op in HASHES:
        assert not getattr(OPS, op)(**arguments(op, requires_grad=True)).requires_grad


# Wrong arguments

WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("fast_hash", {"num_hash": 0}, ValueError, "num_hash: need an integer at least 1, got 0"),
    ("fast_hash", {"signs": torch.ones(3, 1, 8, dtype=torch.int8)}, ValueError, "signs: need shape (*batch, 5, 8)"),
    ("fast_hash", {"signs": torch.zeros(6, 8, dtype=torch.int8)}, ValueError, "signs: every entry must be +1 or -1"),
    ("hyperplane_hash", {"planes": torch.ones(D, 1)}, ValueError, "planes: need shape (*batch, 6, 9)"),
    ("lsh_cumulation", {"hashtable_capacity": 2}, ValueError, "query_hash_code: codes must lie in [0, hashtable_capacity = 2)"),
    ("lsh_cumulation", {"value": torch.ones(*LEADING, 3, D_V)}, ValueError, "value: need 7 at axis -2 (n of key_hash_code)"),
    ("lsh_cumulation", {"key_mask": torch.ones(*LEADING, N_K)}, TypeError, "key_mask: need bool or integer"),
    ("lsh_weighted_cumulation", {"key_weight": torch.ones(*LEADING, N_K, 1)}, ValueError, "key_weight: need 6 at axis -1"),
    ("expectation_attention", {"hash_code_len": 31}, ValueError, "hash_code_len: need an integer between 1 and 30, got 31"),
    ("expectation_attention", {"grad": "upper"}, ValueError, "grad: need one of 'lower_bound', 'exact', got 'upper'"),
    ("expectation_attention", {"variant": "cpu:magic"}, ValueError, "variant: expectation_attention has no variant 'cpu:magic'"),
    ("yoso_attention", {"key": torch.ones(*LEADING, N_K, 9)}, ValueError, "key: need 6 at axis -1 (d of query)"),
    ("yoso_attention", {"value": torch.ones(*LEADING, N_K, D_V).double()}, TypeError, "value: float64 does not go with query"),
    ("yoso_attention", {"backward": "dense"}, ValueError, "backward: need one of 'lsh', 'expectation', got 'dense'"),
    ("yoso_attention", {"signs": None}, ValueError, "signs: the operator draws nothing itself; give signs or planes"),
    ("yoso_attention", {"grad": "upper"}, ValueError, "grad: need one of 'lower_bound', 'exact', got 'upper'"),
]


@pytest.mark.parametrize(("op", "changes", "error", "message"), WRONG, ids=[f"{op}-{next(iter(c))}" for op, c, _, _ in WRONG])
def test_a_wrong_argument_is_refused_as_by_the_face(op: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = arguments(op) | changes
    with pytest.raises(error, match="^" + re.escape(message)):
        getattr(OPS, op)(**call)


@pytest.mark.parametrize(("op", "changes", "error", "message"), WRONG, ids=[f"{op}-{next(iter(c))}" for op, c, _, _ in WRONG])
def test_compiled_code_refuses_it_with_the_same_error(op: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = arguments(op) | changes
    torch.compiler.reset()
    compiled = torch.compile(lambda call: getattr(OPS, op)(**call), fullgraph=True, backend="aot_eager")
    with pytest.raises(error, match="^" + re.escape(message)):
        compiled(call)


def test_codes_are_not_looked_at_when_nobody_wants_it() -> None:
    call = arguments("lsh_cumulation") | {"hashtable_capacity": 2}
    with pytest.raises(ValueError, match="codes must lie in"):
        OPS.lsh_cumulation(**call)
    assert OPS.lsh_cumulation(**call, validate=False).shape == (*LEADING, N_Q, D_V)


# What is imported


@pytest.mark.slow
def test_only_torch_is_imported() -> None:
    script = "import sys, yoso_core.model; assert 'torch' in sys.modules; assert not {'transformers', 'cupy', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_torch_the_extra_is_named() -> None:
    script = "import sys; sys.modules['torch'] = None; import yoso_core; import yoso_core.model"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith(
        "ModuleNotFoundError: yoso_core.model needs PyTorch, which is not installed: pip install 'yoso-core[model]'"
    )


def test_the_module_names_what_it_registers() -> None:
    for op in EVERY:
        assert getattr(ops, op).raw._opoverload is getattr(OPS, op).default


# The length of a row


@pytest.mark.parametrize("variant", [v.name for v in registry.variants("yoso_attention") if v.where in ("numpy", "cpu", "emulated")])
@pytest.mark.parametrize("use_expectation", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_kernel_says_how_long_a_row_was(variant: str, use_expectation: bool, dtype: torch.dtype) -> None:
    """Also where it was tiny, huge, masked or not finite; and the row has the same bits as
    without.
    """
    call = arguments("yoso_attention", dtype) | {"use_expectation": use_expectation, "variant": variant}
    call["value"] *= torch.tensor([1e-30, 1e30, 1.0, 0.0]).to(dtype).reshape(2, 2, 1, 1)
    call["query"][1, 0, 0] = torch.nan
    call["query_mask"][1, 0, 0] = True
    out, length = yoso_core.ops.yoso_attention(**call, return_length=True)
    torch.testing.assert_close(out, yoso_core.yoso_attention(**call), rtol=0, atol=0, equal_nan=True)
    wide = {name: call[name].to(length.dtype) for name in ("query", "key", "value")}
    rows = yoso_core.yoso_attention(**call | wide, normalize_output=False)
    expected = torch.linalg.vector_norm(rows.double(), dim=-1, keepdim=True).to(length.dtype)
    torch.testing.assert_close(length, expected, rtol=1e-5, atol=0, equal_nan=True)
    assert torch.isnan(length[1, 0, 0])
    assert (length[~call["query_mask"]] == 0).all()


def test_without_scaling_there_is_no_length_before_it() -> None:
    call = arguments("yoso_attention")
    with pytest.raises(ValueError, match=r"^return_length: with normalize_output=False no row is scaled"):
        yoso_core.ops.yoso_attention(**call, normalize_output=False, return_length=True)
