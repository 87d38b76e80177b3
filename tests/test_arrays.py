"""Arrays in and out: the caller's kind, dtype and memory layout; and which variant does the
work.
"""

import logging
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import support
import torch
from support import Case, as_dtype, as_float64, build

import yoso_core
from yoso_core import backends, registry

OPS = registry.OPERATIONS
FORWARD = [op for op in OPS if not op.endswith("_backward")]
CASE = Case(7, 9, 6, 4, 3, 4, mask="fully", leading=(2, 3))
EVERY_VARIANT = [pytest.param(v.op, v.name, id=f"{v.op}-{v.name}") for op in FORWARD for v in support.on_the_cpu(op)]


def call_of(op: str, dtype: str = "float32") -> dict[str, Any]:
    return {name: as_dtype(x, dtype) for name, x in build(op, CASE).items()}


def as_tensors(call: dict[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """Floats in the dtype named; codes, masks and signs as they are."""

    def tensor(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        return torch.from_numpy(x).to(getattr(torch, dtype)) if dtype and x.dtype.kind == "f" else torch.from_numpy(x)

    return {name: tensor(x) for name, x in call.items()}


@pytest.mark.parametrize(("op", "variant"), EVERY_VARIANT)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numpy_arrays_come_back(op: str, variant: str, dtype: str) -> None:
    out = getattr(yoso_core, op)(**call_of(op, dtype), variant=variant)
    assert type(out) is np.ndarray
    assert out.dtype == ("int32" if op.endswith("_hash") else dtype)


@pytest.mark.parametrize(("op", "variant"), EVERY_VARIANT)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_come_back_with_what_numpy_gets(op: str, variant: str, dtype: str) -> None:
    out = getattr(yoso_core, op)(**as_tensors(build(op, CASE), dtype), variant=variant)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == (torch.int32 if op.endswith("_hash") else getattr(torch, dtype))
    assert out.device.type == "cpu"
    wide = {"bfloat16": "float32"}.get(dtype, dtype)  # NumPy has no bfloat16: the same numbers in float32, rounded once
    inputs = {
        name: x.to(getattr(torch, wide)) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in (as_tensors(build(op, CASE), dtype).items())
    }
    same = getattr(yoso_core, op)(**{name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}, variant=variant)
    np.testing.assert_array_equal(as_float64(out), as_float64(torch.from_numpy(same).to(out.dtype)))


def transposed(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same numbers, stored column by column."""
    return np.asfortranarray(x)


def spaced(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Every other element of something larger, along every axis."""
    room = np.full([2 * n + 1 for n in x.shape], 99).astype(x.dtype)
    view = room[tuple(slice(1, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def backwards(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Negative strides along every axis."""
    turn = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[turn])[turn]


def shifted(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """At an address that is no multiple of the size of an element."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def frozen(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    copy = x.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize(("op", "variant"), EVERY_VARIANT)
@pytest.mark.parametrize("layout", [transposed, spaced, backwards, shifted, frozen])
def test_the_layout_in_memory_changes_nothing(op: str, variant: str, layout: Any) -> None:
    call = call_of(op)
    expected = getattr(yoso_core, op)(**call, variant=variant)
    laid_out = {name: layout(x) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    np.testing.assert_array_equal(getattr(yoso_core, op)(**laid_out, variant=variant), expected)
    for name, x in call.items():
        np.testing.assert_array_equal(laid_out[name], x, f"{name} was written to")


@pytest.mark.parametrize(("op", "variant"), EVERY_VARIANT)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_heads_expanded_without_a_copy(op: str, variant: str, library: str) -> None:
    """Strides of 0: one batch seen twice."""
    single = {name: x[:1] if isinstance(x, np.ndarray) and name not in ("signs", "planes") else x for name, x in call_of(op).items()}
    draws = ("signs", "planes")
    copied = {name: np.concatenate([x, x]) if isinstance(x, np.ndarray) and name not in draws else x for name, x in single.items()}
    expected = getattr(yoso_core, op)(**copied, variant=variant)
    if library == "numpy":
        expanded = {n: np.broadcast_to(x, copied[n].shape) if isinstance(x, np.ndarray) else x for n, x in single.items()}
    else:
        tensors = as_tensors(single)
        expanded = {n: x.expand(copied[n].shape) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
    np.testing.assert_array_equal(np.asarray(getattr(yoso_core, op)(**expanded, variant=variant)), expected)


@pytest.mark.parametrize(("op", "variant"), EVERY_VARIANT)
def test_tensors_turned_about_without_a_copy(op: str, variant: str) -> None:
    call = call_of(op)
    expected = getattr(yoso_core, op)(**call, variant=variant)
    turned = {n: x.mT.contiguous().mT if isinstance(x, torch.Tensor) and x.dim() > 1 else x for n, x in as_tensors(call).items()}
    np.testing.assert_array_equal(np.asarray(getattr(yoso_core, op)(**turned, variant=variant)), expected)


@pytest.mark.parametrize(("op", "variant"), EVERY_VARIANT)
@pytest.mark.parametrize("leading", [(), (2,), (0,), (2, 0), (2, 1, 3, 2)], ids=str)
def test_any_number_of_leading_dims(op: str, variant: str, leading: tuple[int, ...]) -> None:
    """The result for many heads is that of the heads laid in a row."""
    case = Case(7, 9, 6, 4, 3, 4, leading=leading, mask="none" if not leading else "broadcast")
    call = {name: as_dtype(x, "float32") for name, x in build(op, case).items()}
    if leading and 0 not in leading:  # one draw for all heads
        call |= {name: x[0] for name, x in call.items() if name in ("signs", "planes")}
    out = getattr(yoso_core, op)(**call, variant=variant)
    assert out.shape[: len(leading)] == leading
    if not leading:
        assert np.isfinite(out).all()
    if not leading or 0 in leading:
        return
    shared = ("signs", "planes")
    flat = {
        name: np.broadcast_to(x, (*leading, x.shape[-1])).reshape(-1, x.shape[-1])
        if name.endswith("_mask")
        else x.reshape(int(np.prod(leading)), *x.shape[-2:])
        if isinstance(x, np.ndarray) and name not in shared
        else x
        for name, x in call.items()
    }
    np.testing.assert_array_equal(getattr(yoso_core, op)(**flat, variant=variant).reshape(out.shape), out)


# Which variant does the work


@pytest.mark.parametrize("op", OPS)
def test_variants_lists_one_definition_and_says_what_is_missing(op: str) -> None:
    listed = yoso_core.variants(op)
    assert listed == yoso_core.variants(getattr(yoso_core, op))
    assert sum(v.definition for v in listed) == 1
    assert len({v.name for v in listed}) == len(listed)
    for variant in listed:
        assert variant.summary
        assert (variant.reason is None) == variant.available


@pytest.mark.parametrize(("op", "name"), EVERY_VARIANT)
def test_the_variant_named_is_the_one_that_runs(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    call = registry.Kernel.call

    def recording(kernel: registry.Kernel, *args: Any, **kwargs: Any) -> Any:
        ran.append(kernel.name)
        return call(kernel, *args, **kwargs)

    monkeypatch.setattr(registry.Kernel, "call", recording)
    getattr(yoso_core, op)(**call_of(op), variant=name)
    assert ran == [name]
    getattr(yoso_core, op)(**call_of(op))
    assert ran == [name, support.on_the_cpu(op)[0].name]


@pytest.mark.parametrize("op", [op for op in FORWARD if any(v.name.startswith("cpu:") for v in yoso_core.variants(op))])
def test_a_variant_that_cannot_run_raises_with_the_reason(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda where: "numba is on holiday" if where == "cpu" else None)
    compiled = next(v for v in yoso_core.variants(op) if v.name.startswith("cpu:"))
    assert not compiled.available
    assert compiled.reason == "numba is on holiday"
    with pytest.raises(ValueError, match=rf"^variant: {compiled.name} of {op} cannot run here: numba is on holiday$"):
        getattr(yoso_core, op)(**call_of(op), variant=compiled.name)
    getattr(yoso_core, op)(**call_of(op))  # unnamed, the next best runs


def test_the_reason_names_the_package_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda package: None)
    assert backends.missing.__wrapped__("cpu") == "the package 'numba' is not installed: pip install numba"


def test_the_automatic_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    registry._announce.cache_clear()
    call = call_of("lsh_cumulation")
    with caplog.at_level(logging.INFO, logger="yoso_core"):
        yoso_core.lsh_cumulation(**call, variant="numpy:pairs")  # named: nothing to say
        assert not caplog.messages
        yoso_core.lsh_cumulation(**call)
        yoso_core.lsh_cumulation(**call)
    best = support.on_the_cpu("lsh_cumulation")[0].name
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"lsh_cumulation: {best} was chosen")


def test_a_cupy_array_gets_a_clear_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy is recognized where it is loaded, and where nothing runs on a GPU, the reason is
    said.
    """

    class FakeDevice:
        id = 0

    class FakeArray:
        dtype, shape, ndim, device = np.dtype("float32"), (3, 8), 2, FakeDevice()

    class FakePlanes(FakeArray):
        shape = (8, 1)

    cupy = ModuleType("cupy")
    cupy.ndarray = FakeArray  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(backends, "missing", lambda where: "no NVIDIA GPU" if where in ("cupy", "numba_cuda") else None)
    with pytest.raises(ValueError, match=r"^hyperplane_hash: no variant here runs on cuda:0 with these inputs \(cupy:.*no NVIDIA GPU"):
        yoso_core.hyperplane_hash(FakeArray(), FakePlanes(), 1, 1)
    with pytest.raises(TypeError, match=r"^signs: a NumPy array, but vectors is a CuPy array; give all arrays in one library"):
        yoso_core.fast_hash(FakeArray(), np.ones((3, 1, 8), np.int8), 1, 1)


def test_something_that_only_looks_like_an_array_is_refused() -> None:
    class LooksLikeOne:
        dtype, shape, ndim = np.dtype("float32"), (8,), 1

    with pytest.raises(TypeError, match=r"^x: need a NumPy array, a torch tensor or a CuPy array, got LooksLikeOne$"):
        yoso_core.hadamard_transform(LooksLikeOne())


# Random draws of the whole attention


def test_one_seed_gives_one_result_and_no_neighbor_changes_it() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 9, 6)).astype(np.float32)
    out = yoso_core.yoso_attention(x, x, x, num_hash=3, hash_code_len=3, rng=5)
    np.testing.assert_array_equal(out, yoso_core.yoso_attention(x, x, x, num_hash=3, hash_code_len=3, rng=5))
    assert (out != yoso_core.yoso_attention(x, x, x, num_hash=3, hash_code_len=3, rng=6)).any()
    assert (out != yoso_core.yoso_attention(x, x, x, num_hash=3, hash_code_len=3)).any()
    single = yoso_core.yoso_attention(x[1:2], x[1:2], x[1:2], num_hash=3, hash_code_len=3, rng=5)
    np.testing.assert_array_equal(single, out[1:2])
    signs = yoso_core.sample_signs(3, 3, 6, batch_shape=(2,), rng=5)
    np.testing.assert_array_equal(out, yoso_core.yoso_attention(x, x, x, num_hash=3, hash_code_len=3, signs=signs))


def test_the_poison_shows() -> None:
    with support.poisoned_allocations():
        assert np.isnan(np.empty(3)).all()
        assert (np.empty_like(np.zeros(3, np.int32)) == -1).all()
