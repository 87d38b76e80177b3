"""The house: imports point one way, and an operation is one record, so that a new one, or a kernel
of a reader's own, is taken up by everything that is generic.

The toy of this module follows the checklist of CONTRIBUTING.md in its order.
"""

import ast
import inspect
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import torch

import yoso_core
from yoso_core import arrays, checks, operations, registry
from yoso_core.gpu import CudaVariant, KernelText, NumbaCudaVariant
from yoso_core.operations import OPERATIONS, Operation, Output

FACE = Path(yoso_core.__file__).parent

LAYERS = (
    {"reference", "processor"},
    {"cpu", "gpu"},
    {"arrays", "checks", "files", "memory", "backends", "operations", "own_kernel", "registry", "ops"},
    {"truth", "inputs", "adaptive"},
    {"model"},
    {"attend"},
    {"comparison", "comparison_view", "planning", "warming", "draw", "__init__", "cli", "__main__", "demo", "benchmarks", "tutorials"},
)
"""Names below ``yoso_core``, from the bottom up: each may use its own layer and those before it."""

IMPORT_ATTEND = {"__init__", "cli", "comparison"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, ``yoso_core`` itself as
    ``yoso_core.__init__``.
    """
    found = {}
    for folder, _, files in os.walk(FACE, followlinks=True):
        package = ".".join(("yoso_core", *Path(folder).relative_to(FACE).parts))
        modules = [name for name in files if name.endswith(".py") and not name[0].isdigit()]
        found |= {f"{package}.{name.removesuffix('.py')}": Path(folder, name) for name in modules}
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, inside functions too; not what only a type
    checker reads.
    """
    pending: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (whole(alias.name, known) for alias in node.names if alias.name.split(".")[0] == "yoso_core")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "yoso_core":
            yield from (whole(f"{node.module}.{alias.name}", known) for alias in node.names)


def whole(name: str, known: dict[str, Path]) -> str:
    """The module that a dotted name of a module, of a package, or of something in one stands
    for.
    """
    for candidate in (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__"):
        if candidate in known:
            return candidate
    raise AssertionError(f"{name} is in no module of the package")


def layer(module: str) -> int:
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {module: set(imported(path, known)) - {module} for module, path in known.items()}


def test_every_module_has_its_layer(arrows: dict[str, set[str]]) -> None:
    assert {module.split(".")[1] for module in arrows} == set().union(*LAYERS)


def test_imports_point_down(arrows: dict[str, set[str]]) -> None:
    against = [f"{module} -> {other}" for module, others in arrows.items() for other in others if layer(other) > layer(module)]
    across = [
        f"{module} -> {other}"
        for module, others in arrows.items()
        for other in others
        if {module.split(".")[1], other.split(".")[1]} == {"cpu", "gpu"}
    ]
    assert against + across == []


def test_only_the_top_imports_attend(arrows: dict[str, set[str]]) -> None:
    users = {module.removeprefix("yoso_core.") for module, others in arrows.items() if "yoso_core.attend" in others}
    assert users <= IMPORT_ATTEND


def test_no_circle_of_imports(arrows: dict[str, set[str]]) -> None:
    left = dict(arrows)
    while ends := [module for module, others in left.items() if not others & set(left)]:
        for module in ends:
            del left[module]
    assert sorted(left) == []


def test_the_walk_sees_an_arrow(tmp_path: Path) -> None:
    """The tests above could not fail if it did not."""
    known = modules()
    (tmp_path / "m.py").write_text("def f():\n    from yoso_core.attend import yoso_attention\n    import yoso_core.model.ops\n")
    assert set(imported(tmp_path / "m.py", known)) == {"yoso_core.attend", "yoso_core.model.ops"}


def test_generic_code_names_no_operation() -> None:
    """Only the records, their functions and the rows of kernels do."""
    generic = ("truth", "inputs", "comparison", "comparison_view", "own_kernel", "backends")
    texts = {name: (FACE / f"{name}.py").read_text("utf-8") for name in generic}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    strings = {
        (name, node.value)
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert [(name, value) for name, value in strings if value in OPERATIONS] == []


# ---------------------------------------------------------------- a record, and what belongs to it


@pytest.mark.parametrize("op", OPERATIONS)
def test_its_definition_is_a_row_of_the_table(op: str) -> None:
    (row,) = (kernel for kernel in registry.KERNELS if kernel.op == op and kernel.definition)
    assert row.where == "numpy"
    assert callable(row.load())


@pytest.mark.parametrize("op", OPERATIONS)
def test_its_function_is_public_and_takes_what_the_definition_takes(op: str) -> None:
    operation = OPERATIONS[op]
    assert op in yoso_core.__all__
    taken = set(inspect.signature(registry.definition_of(op).load()).parameters)
    assert taken <= set(operation.positional) | set(operation.keywords)
    assert "variant" in operation.keywords


@pytest.mark.parametrize("op", OPERATIONS)
def test_its_outputs_are_what_it_says(op: str) -> None:
    args, kwargs = yoso_core.example_inputs(op, n=9, n_key=11, dim=8, value_dim=5, num_hash=3, hash_code_len=4)
    operation = OPERATIONS[op]
    arguments = dict(zip(operation.positional, args, strict=True)) | kwargs
    found = support.as_tuple(getattr(yoso_core, op)(*args, **kwargs))
    assert [x.shape for x in found] == [output.shape(arguments) for output in operation.outputs_of(arguments)]
    assert [x.dtype for x in found] == ["int32" if output.dtype_of is None else "float32" for output in operation.outputs_of(arguments)]


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_rounding_error_is_relative_to_something(op: str) -> None:
    operation = OPERATIONS[op]
    assert (operation.terms is None) == operation.is_hash
    assert (operation.projections is not None) == (operation.is_hash and not operation.exact)
    assert operation.codes_may_differ == 0 or not operation.exact


@pytest.mark.parametrize("op", OPERATIONS)
def test_it_costs_something(op: str) -> None:
    """Twice the rows cost twice as much, up to four times as much where every pair counts. A table
    has its own rows: there it is twice the heads.
    """
    small = operations.Sizes(rows=2 * 64, n=64, dim=32, num_hash=8, hash_code_len=4, item_size=4, oversample=OPERATIONS[op].oversample)
    large = small._replace(rows=2 * small.rows, n=small.n if op == "smooth_table" else 2 * small.n)
    assert 2 <= OPERATIONS[op].multiply_adds(large) / OPERATIONS[op].multiply_adds(small) <= 4
    assert OPERATIONS[op].least_bytes(large) == 2 * OPERATIONS[op].least_bytes(small) > 0


def test_faults_are_planted_in_every_definition() -> None:
    from test_registry import FAULTS

    assert set(FAULTS) == set(OPERATIONS)


# ---------------------------------------------------------------- a new operation: the checklist


def scaled_sum(value: Any, scale: int, *, key_mask: Any = None) -> Any:
    """The reference: ``out = scale sum_j v_j``, over the keys that are kept."""
    kept = value if key_mask is None else np.where(key_mask[..., None], value, 0)
    return np.sum(kept, axis=-2, keepdims=True) * value.dtype.type(scale)


SCALED_SUM = Operation(
    name="scaled_sum",
    module="toy_face",
    definition="numpy:sum",
    outputs=(Output("out", "value", lambda arguments: (*arguments["value"].shape[:-2], 1, arguments["value"].shape[-1])),),
    example_inputs=lambda given: {"value": given.value, "scale": 3, "key_mask": given.masks.get("key_mask")},
    terms=lambda arguments, cosine_ulp: (scaled_sum(**{**arguments, "value": np.abs(arguments["value"])}),),
    multiply_adds=lambda sizes: sizes.rows * sizes.dim,
    least_bytes=lambda sizes: sizes.vectors,
)


def face(value: Any, scale: int, *, key_mask: Any = None, variant: str | None = None) -> Any:
    caller = arrays.one_caller({"value": value}, key_mask=key_mask)
    checks.floating("value", value)
    return registry.run(SCALED_SUM, variant, caller, {"value": value, "scale": scale, "key_mask": key_mask})


def in_turn(value: Any, scale: int, *, key_mask: Any = None) -> Any:
    """A kernel: the keys one after another."""
    out = np.zeros((*value.shape[:-2], 1, value.shape[-1]), value.dtype)
    for key in range(value.shape[-2]):
        row = value[..., key : key + 1, :]
        out += row if key_mask is None else np.where(key_mask[..., key : key + 1, None], row, 0)
    return out * value.dtype.type(scale)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("toy_face")
    face.__name__ = "scaled_sum"
    module.scaled_sum = face  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_face", module)
    monkeypatch.setattr(yoso_core, "scaled_sum", face, raising=False)
    monkeypatch.setitem(operations.OPERATIONS, "scaled_sum", SCALED_SUM)
    with registry.register("scaled_sum", "numpy:sum", scaled_sum):
        yield


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_new_operation_is_one_record_one_reference_and_one_face(dtype: str) -> None:
    """What is generic takes it up: inputs, truth, comparison, and the check of every variant."""
    library: Any = "torch" if dtype == "bfloat16" else "numpy"
    args, kwargs = yoso_core.example_inputs("scaled_sum", n=41, dim=16, dtype=dtype, library=library, masked=True)
    found = yoso_core.compare("scaled_sum", *args, repeats=1, also={"in_turn": in_turn}, **kwargs)
    assert [(row.variant, row.verdict) for row in found.rows] == [("numpy:sum", "agrees"), ("in_turn", "agrees")]
    with registry.register("scaled_sum", "in_turn", in_turn):
        for case in (support.Case(7, 63, 8, 48, 1, 4, dtype, mask="masked"), support.Case(7, 0, 8, 1, 1, 4, dtype)):
            support.check_variant("scaled_sum", "in_turn", case)


@pytest.mark.usefixtures("toy")
def test_a_fault_in_the_toy_kernel_turns_the_check_red() -> None:
    with (
        registry.register("scaled_sum", "drops_one", lambda value, *a, **k: in_turn(value[..., :-1, :], 3)),
        pytest.raises(AssertionError),
    ):
        support.check_variant("scaled_sum", "drops_one", support.Case(7, 63, 8, 48, 1, 4))


@pytest.mark.usefixtures("toy")
def test_a_new_operation_has_no_automatic_choice_until_the_table_of_kernels_has_a_row() -> None:
    with pytest.raises(ValueError, match=r"^scaled_sum: no variant here runs on cpu"):
        face(np.ones((3, 4)), 2)


# ---------------------------------------------------------------- a reader's own kernel


def mine(query_hash_code: Any, key_hash_code: Any, value: Any, hashtable_capacity: int, *, key_mask: Any = None) -> Any:
    meet = np.mean(query_hash_code[..., :, None, :] == key_hash_code[..., None, :, :], axis=-1, dtype=value.dtype)
    kept = value if key_mask is None else np.where(key_mask[..., None], value, 0)
    return meet @ kept


SMALL = {"n": 33, "n_key": 41, "dim": 16, "value_dim": 20, "num_hash": 7, "hash_code_len": 5}


def compared(target: Any, op: str = "lsh_cumulation", emulate: bool = False, **sizes: Any) -> list[Any]:
    """The rows of a kernel of one's own beside the definition, which has nothing to fear from
    it.
    """
    args, kwargs = yoso_core.example_inputs(op, **(SMALL | sizes))
    definition = OPERATIONS[op].definition
    found = yoso_core.compare(op, *args, repeats=2, variants=[definition], also={"mine": target}, emulate=emulate, **kwargs)
    assert found.rows[0].verdict == "agrees"
    assert [variant.name for variant in yoso_core.variants(op) if "mine" in variant.name] == [], "it is gone afterwards"
    return list(found.rows[1:])


def test_a_function_of_ones_own_is_compared_listed_and_called() -> None:
    (row,) = compared(mine)
    assert (row.variant, row.verdict, row.automatic) == ("mine", "agrees", False)
    args, _ = yoso_core.example_inputs("lsh_cumulation", **SMALL)
    right = yoso_core.lsh_cumulation(*args)
    with yoso_core.register("lsh_cumulation", "mine", mine) as registration:
        (listed,) = (variant for variant in yoso_core.variants("lsh_cumulation") if variant.name == "mine")
        assert (listed.where, listed.available, registration.name) == ("numpy", True, "mine")
        np.testing.assert_allclose(yoso_core.lsh_cumulation(*args, variant="mine"), right, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has no variant 'mine'"):
        yoso_core.lsh_cumulation(*args, variant="mine")


def test_a_kernel_of_ones_own_is_never_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yoso_core.backends.missing", lambda where: None if where == "numpy" else "not here")

    def refuses(*args: Any) -> Any:
        raise AssertionError("it was chosen")

    args, _ = yoso_core.example_inputs("hadamard_transform")
    with registry.register("hadamard_transform", "refuses", refuses):
        yoso_core.hadamard_transform(*args)
        chosen = registry.automatic("hadamard_transform", "cpu")
    assert chosen is not None
    assert chosen.name == "numpy:butterflies"


def test_it_has_gradients() -> None:
    """It returns what the function does; the length that the backward pass needs is found out."""
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_hash": 3, "hash_code_len": 4, "signs": torch.from_numpy(yoso_core.sample_signs(3, 4, 16, rng=0))}
    found = []
    with registry.register("yoso_attention", "mine", yoso_core.reference.yoso_attention):
        for variant in ("mine", "numpy:formula"):
            leaf = x.clone().requires_grad_()
            out = yoso_core.yoso_attention(leaf, leaf, leaf, **options, variant=variant)
            assert torch.equal(out, yoso_core.yoso_attention(x, x, x, **options, variant=variant))
            found.append(torch.autograd.grad(out.pow(3).sum(), leaf)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_what_it_is_given() -> None:
    """The public function's arguments; arrays fresh, writable, contiguous; masks by keyword, and
    only when given; signs, where a call would draw them.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def attention(*args: Any, **options: Any) -> Any:
        seen.append((args, options))
        return yoso_core.reference.yoso_attention(*args, **options)

    x = np.random.default_rng(0).standard_normal((2, 9, 16), dtype=np.float32)[:, ::-1]
    keep = np.arange(9)[None] > 2
    with registry.register("yoso_attention", "mine", attention):
        yoso_core.yoso_attention(x, x, x, num_hash=3, hash_code_len=4, rng=0, variant="mine")
        yoso_core.yoso_attention(x, x, x, num_hash=3, hash_code_len=4, rng=0, key_mask=keep, variant="mine")
    (args, options), (_, masked) = seen
    assert len(args) == 3
    assert set(options) == {"num_hash", "hash_code_len", "use_expectation", "signs", "normalize_output"}
    assert set(masked) - set(options) == {"key_mask"}
    for given in (*args, options["signs"], masked["key_mask"]):
        assert given.flags.c_contiguous
        assert given.flags.writeable
        assert given.flags.owndata
        assert not np.shares_memory(given, x)
    np.testing.assert_array_equal(args[0], x)


def test_bfloat16_arrives_as_float32_and_goes_back_as_it_came() -> None:
    import torch

    args, _ = yoso_core.example_inputs("lsh_cumulation", dtype="bfloat16", library="torch", **SMALL)
    with registry.register("lsh_cumulation", "mine", mine):
        out = yoso_core.lsh_cumulation(*args, variant="mine")
    assert (type(out), out.dtype) == (torch.Tensor, torch.bfloat16)


def overwrites(query_hash_code: Any, key_hash_code: Any, value: Any, hashtable_capacity: int) -> Any:
    out = mine(query_hash_code, key_hash_code, value, hashtable_capacity)
    value *= 2
    return out


class Restless:
    calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return np.nextafter(mine(*args), np.float32(self.calls % 2))


def raises(*args: Any) -> Any:
    raise ZeroDivisionError("of all things")


def leaves(*args: Any) -> Any:
    sys.exit(3)


@pytest.mark.parametrize(
    ("target", "verdict", "said"),
    [
        (lambda *a: mine(*a)[..., :-1, :], "failed", "returned shape (1, 2, 32, 20), need (1, 2, 33, 20)"),
        (lambda *a: mine(*a).astype(np.float64), "failed", "returned float64, need float32, the dtype of value"),
        (lambda *a: None, "failed", "returned nothing, need an array"),
        (lambda *a: mine(*a).tolist(), "failed", "returned list, need an array"),
        (lambda *a: (mine(*a), mine(*a)), "failed", "returned 2 arrays, need 1: out"),
        (lambda *a: mine(*a) * np.nan, "disagrees", None),
        (lambda *a: mine(*a) + np.float32(1e-3), "disagrees", None),
        (raises, "failed", "ZeroDivisionError: of all things"),
        (leaves, "failed", "SystemExit: 3"),
        (lambda: None, "failed", "TypeError: "),
        (overwrites, "failed", "overwrote its argument value"),
        (Restless(), "not repeatable", None),
    ],
)
def test_what_goes_wrong_is_one_row(target: Any, verdict: str, said: str | None) -> None:
    (row,) = compared(target)
    assert row.verdict == verdict
    assert (row.failure or "").startswith(said or "")
    assert (said is None) == (row.failure is None)


def test_all_nan_is_said() -> None:
    args, _ = yoso_core.example_inputs("lsh_cumulation", **SMALL)
    found = yoso_core.compare("lsh_cumulation", *args, repeats=1, variants=["numpy:pairs"], also={"mine": lambda *a: mine(*a) * np.nan})
    assert found.rows[1].content == "all NaN"


PAIRS = KernelText(
    """
extern "C" __global__ void pairs(const int* query, const int* key, const float* value, float* out, int n_q, int n_k, int m, int d) {
  const int row = blockIdx.y * n_q + blockIdx.x, column = threadIdx.x;
  float sum = 0;
  for (int j = 0; j < n_k; ++j)
    for (int hash = 0; hash < m; ++hash)
      if (query[row * m + hash] == key[(blockIdx.y * n_k + j) * m + hash]) sum += value[(blockIdx.y * n_k + j) * d + column];
  out[row * d + column] = sum / m;
}""",
    "pairs",
)


def launch_pairs(device: Any, query_hash_code: Any, key_hash_code: Any, value: Any, hashtable_capacity: int) -> Any:
    *leading, n_q, m = query_hash_code.shape
    n_k, d = value.shape[-2:]
    out = device.empty((*leading, n_q, d), value.dtype)
    sizes = [np.int32(x) for x in (n_q, n_k, m, d)]
    device.launch(PAIRS, (n_q, int(np.prod(leading))), (d,), (query_hash_code, key_hash_code, value, out, *sizes))
    return out


def test_cuda_of_ones_own_runs_in_the_emulator_when_asked() -> None:
    support.need("emulated")
    on_gpu, emulated = compared(CudaVariant(launch_pairs), emulate=True, n=9, n_key=11)
    assert (on_gpu.variant, emulated.variant, emulated.verdict, emulated.emulated) == ("cupy:mine", "emulated:mine", "agrees", True)
    if on_gpu.reason is not None:
        assert [row.verdict for row in compared(CudaVariant(launch_pairs))] == ["cannot run"]


def test_a_fault_in_cuda_of_ones_own_is_a_row() -> None:
    support.need("emulated")
    spoiled = KernelText(PAIRS.text.replace("sum / m", "sum"), "pairs")

    def launch(device: Any, query_hash_code: Any, key_hash_code: Any, value: Any, hashtable_capacity: int) -> Any:
        *leading, n_q, m = query_hash_code.shape
        n_k, d = value.shape[-2:]
        out = device.empty((*leading, n_q, d), value.dtype)
        sizes = [np.int32(x) for x in (n_q, n_k, m, d)]
        device.launch(spoiled, (n_q, int(np.prod(leading))), (d,), (query_hash_code, key_hash_code, value, out, *sizes))
        return out

    assert compared(CudaVariant(launch), emulate=True, n=9, n_key=11)[-1].verdict == "disagrees"


def test_numba_cuda_of_ones_own_runs_in_the_stepper() -> None:
    support.need("stepped")
    from yoso_core.gpu.numba_kernels.cumulation import lsh_cumulation_shared_table

    assert compared(NumbaCudaVariant(lsh_cumulation_shared_table), emulate=True, n=5, n_key=7, dim=4, value_dim=4)[-1].verdict == "agrees"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: registry.register("softmax", "mine", mine), ValueError, "op: no operation 'softmax'"),
        (lambda: registry.register("lsh_cumulation", "", mine), TypeError, "name: need a name for the kernel, got ''"),
        (lambda: registry.register("lsh_cumulation", "cpu:tables", mine), ValueError, "name: lsh_cumulation has a variant 'cpu:tables'"),
        (lambda: registry.register("lsh_cumulation", "mine", mine, where="gpu"), ValueError, "where: need one of 'numpy', 'cpu', 'cupy'"),
        (
            lambda: registry.register("lsh_cumulation", "mine", mine, where="cupy"),
            TypeError,
            "target: a kernel for 'cupy' comes as CudaVariant",
        ),
        (
            lambda: registry.register("lsh_cumulation", "mine", CudaVariant(mine)),
            ValueError,
            "where: a CudaVariant runs on 'cupy' or 'emulated'",
        ),
        (lambda: registry.register("lsh_cumulation", "mine", 3), TypeError, "target: need a function, got 3"),  # type: ignore[arg-type]
        (lambda: yoso_core.compare("lsh_cumulation", also=[mine]), TypeError, "also: need a dict of kernels by name, got list"),  # type: ignore[arg-type]
        (lambda: yoso_core.compare("lsh_cumulation", also={"numpy:pairs": mine}), ValueError, "also: lsh_cumulation has a variant"),
        (lambda: yoso_core.compare("lsh_cumulation", also={"mine": None}), TypeError, "also: target: need a function, got None"),
    ],
)
def test_wrong_registrations_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()
    assert [variant.name for variant in yoso_core.variants("lsh_cumulation") if variant.kernel.registered_on] == []


def test_a_name_of_ones_own_may_be_given_again() -> None:
    """A cell of a notebook is run twice; the older registration then has nothing to take out."""
    with registry.register("hadamard_transform", "mine", lambda x: x):
        first = registry.register("hadamard_transform", "mine", lambda x: 2 * x)
        assert sum(variant.name == "mine" for variant in yoso_core.variants("hadamard_transform")) == 1
    np.testing.assert_array_equal(yoso_core.hadamard_transform(np.ones(2), variant="mine"), [2, 2])
    first.unregister()
    first.unregister()
    assert not any(variant.name == "mine" for variant in yoso_core.variants("hadamard_transform"))
