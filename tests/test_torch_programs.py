"""Torch records and transforms programs: `torch.func`, forward mode, `torch.compile`, traces, fake
tensors. The functions of `yoso_core` are right there, or refuse by name.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_torch_ops import BACKWARD, CUMULATIONS, EVERY, HASHES, OPS, TRANSFORM, arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import yoso_core
from yoso_core.model import YosoConfig, YosoForMaskedLM, YosoModel, ops, yoso_attention, yoso_attention_with_weights

# Forward mode imports decompositions of torch's own, which it writes in its deprecated script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

N_Q, N_K, D = 5, 7, 6
TAU = M = 3

MODES: dict[str, dict[str, Any]] = {
    "sampled": {},
    "chained": {"layout": "chained"},
    "exact": {"grad": "exact"},
    "expectation": {"use_expectation": True},
    "expectation_exact": {"use_expectation": True, "grad": "exact"},
    "by_expectation": {"backward": "expectation"},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(mode: dict[str, Any], *, normalize_output: bool = True) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Masked attention of two heads, and the query, key and value to call it with."""
    options = {"num_hash": M, "hash_code_len": TAU, "normalize_output": normalize_output, **mode}
    if not mode.get("use_expectation"):
        layout = mode.get("layout", "chained")
        options["signs"] = torch.from_numpy(yoso_core.sample_signs(M, TAU, D, batch_shape=(2,), layout=layout, rng=0))
    options |= {"query_mask": torch.arange(2 * N_Q).reshape(2, N_Q) != 3, "key_mask": torch.arange(2 * N_K).reshape(2, N_K) != 4}
    vectors = normal(2, N_Q, D, seed=1), normal(2, N_K, D, seed=2), normal(2, N_K, D, seed=3)
    return lambda *x: yoso_attention(*x, **options), vectors


def by_duals(function: Callable[..., Tensor], vectors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        found: Tensor = forward_ad.unpack_dual(function(*map(forward_ad.make_dual, vectors, tangents))).tangent
        return found


# Derivatives


@every_mode
@pytest.mark.parametrize("normalize_output", [True, False])
def test_forward_mode_is_the_transpose_of_the_backward_pass(mode: dict[str, Any], normalize_output: bool) -> None:
    attend, vectors = problem(mode, normalize_output=normalize_output)
    tangents = tuple(normal(*x.shape, seed=4 + i) for i, x in enumerate(vectors))
    cotangent = normal(2, N_Q, D, seed=9)
    out, moved = torch.func.jvp(attend, vectors, tangents)
    assert torch.equal(out, attend(*vectors))
    _, pull_back = torch.func.vjp(attend, *vectors)
    pairing = sum((g * t).sum() for g, t in zip(pull_back(cotangent), tangents, strict=True))
    torch.testing.assert_close((cotangent * moved).sum(), pairing, rtol=1e-10, atol=1e-10)
    assert moved.abs().max() > 0.01
    torch.testing.assert_close(by_duals(attend, vectors, tangents), moved, rtol=0, atol=0)


@every_mode
def test_gradients_under_transforms_are_those_of_autograd(mode: dict[str, Any]) -> None:
    attend, vectors = problem(mode)
    leaves = [x.clone().requires_grad_() for x in vectors]
    expected = torch.autograd.grad(attend(*leaves).pow(3).sum(), leaves)
    got = torch.func.grad(lambda *x: attend(*x).pow(3).sum(), argnums=(0, 1, 2))(*vectors)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@every_mode
def test_jacobians_by_rows_and_by_columns_agree(mode: dict[str, Any]) -> None:
    attend, vectors = problem(mode)
    by_rows, by_columns = (jacobian(attend, argnums=1)(*vectors) for jacobian in (torch.func.jacrev, torch.func.jacfwd))
    assert by_rows.shape == (2, N_Q, D, 2, N_K, D)
    torch.testing.assert_close(by_rows, by_columns, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("op", [*TRANSFORM, *CUMULATIONS])
def test_linear_operations_pass_gradcheck_forward_and_backward(op: str) -> None:
    call = arguments(op, torch.float64, requires_grad=True)
    names = [name for name, x in call.items() if isinstance(x, Tensor) and x.requires_grad]

    def function(*x: Tensor) -> Tensor:
        found: Tensor = getattr(yoso_core.model.ops, op)(**call | dict(zip(names, x, strict=True)))
        return found

    assert torch.autograd.gradcheck(function, tuple(call[name] for name in names), check_forward_ad=True)


@pytest.mark.parametrize("op", [op for op in EVERY if op not in HASHES])
def test_an_operator_called_by_its_registered_name_refuses_a_tangent(op: str) -> None:
    """torch would drop it."""
    call = arguments(op)
    name = next(name for name, x in call.items() if isinstance(x, Tensor) and x.is_floating_point())

    def function(x: Tensor) -> Any:
        return getattr(OPS, op)(**call | {name: x})

    with pytest.raises(NotImplementedError, match=rf"^{name}: carries a forward-mode derivative"):
        torch.func.jvp(function, (call[name],), (call[name],))
    with pytest.raises(NotImplementedError, match=rf"^{name}: carries a forward-mode derivative"), forward_ad.dual_level():
        function(forward_ad.make_dual(call[name], call[name]))


@pytest.mark.parametrize("op", BACKWARD)
def test_gradients_of_gradients_are_refused_under_transforms_too(op: str) -> None:
    call = arguments(op)
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        torch.func.grad(lambda x: getattr(ops, op)(**call | {"query": x})[0].sum())(call["query"])
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        torch.func.jvp(lambda x: getattr(ops, op)(**call | {"query": x}), (call["query"],), (call["query"],))


def test_hashes_do_not_move() -> None:
    for op in HASHES:
        call = arguments(op)
        codes, moved = torch.func.jvp(
            lambda x, op=op, call=call: getattr(ops, op)(**call | {"vectors": x}), (call["vectors"],) * 1, (call["vectors"],)
        )
        assert not codes.is_floating_point()
        assert not moved.any()


# A batch dim from outside


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_vmap_of_every_tensor_and_of_one(op: str, masked: bool) -> None:
    """The same as a loop, whichever tensors have the dim and wherever it stands."""
    calls = [arguments(op, masked=masked)]
    tensors = [name for name, x in calls[0].items() if isinstance(x, Tensor)]
    calls.append(calls[0] | {name: other(calls[0][name]) for name in tensors})
    for batched in (tensors, *([name] for name in tensors)):
        stacked = {name: torch.stack([call[name] for call in calls], dim=-1) for name in batched}
        found = torch.vmap(lambda x, given=calls[0]: getattr(ops, op)(**given | x), in_dims=(-1,))(stacked)
        each = [getattr(ops, op)(**calls[0] | {name: call[name] for name in batched}) for call in calls]
        for i, expected in enumerate(each):
            for got, right in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
                rounding = 1e-5 if op == "lsh_weighted_cumulation" else 0  # bucket by bucket, in another order
                torch.testing.assert_close(got[i], right, rtol=rounding, atol=rounding, msg=lambda text, of=(batched, i): f"{of}: {text}")


def test_vmap_of_the_signs_of_a_chain() -> None:
    """They have a dim less than those of the paper's layout."""
    call = arguments("fast_hash") | {"layout": "chained"}
    draws = torch.stack([torch.from_numpy(yoso_core.sample_signs(M, TAU, D, batch_shape=(2,), layout="chained", rng=i)) for i in range(3)])
    found = torch.vmap(lambda signs: ops.fast_hash(**call | {"signs": signs}))(draws)
    for codes, signs in zip(found, draws, strict=True):
        assert torch.equal(codes, yoso_core.fast_hash(**call | {"signs": signs}))
        assert not torch.equal(codes, yoso_core.fast_hash(**call | {"signs": draws[0]})) or torch.equal(signs, draws[0])


def other(x: Tensor) -> Tensor:
    """Another argument of its kind."""
    return ~x if x.dtype == torch.bool else -x if x.dtype == torch.int8 else x.flip(-2) if x.is_floating_point() else x.flip(-1)


def test_a_gradient_for_every_sample() -> None:
    attend, vectors = problem({})
    batches = [torch.stack([x, 2 * x.flip(0) + 1, -x]) for x in vectors]
    loss = torch.func.grad(lambda *x: attend(*x).pow(3).sum(), argnums=(0, 1, 2))
    together = torch.vmap(loss)(*batches)
    for i in range(3):
        torch.testing.assert_close([x[i] for x in together], list(loss(*(x[i] for x in batches))), rtol=1e-12, atol=1e-12)


# Programs that are recorded


def calls_of_the_face(op: str) -> tuple[Callable[[Tensor], Any], Tensor]:
    """A call of the function, of its first float argument."""
    call = arguments(op)
    name = next(name for name, x in call.items() if isinstance(x, Tensor) and x.is_floating_point())
    return lambda x: getattr(yoso_core, op)(**call | {name: x}), call[name]


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


FACE = [op for op in EVERY if op != "yoso_attention_backward"]


@pytest.mark.parametrize("op", FACE)
def test_the_compiler_takes_a_function_of_the_face_as_one_graph(op: str) -> None:
    torch.compiler.reset()
    function, x = calls_of_the_face(op)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert all(map(torch.equal, as_tuple(compiled(x)), as_tuple(function(x))))
    assert all(map(torch.equal, as_tuple(compiled(2 * x)), as_tuple(function(2 * x))))


@pytest.mark.parametrize("op", FACE)
def test_traces_hold_the_operator_and_not_its_result(op: str) -> None:
    function, x = calls_of_the_face(op)
    traced = torch.jit.trace(function, (x,), check_trace=False)
    recorded = make_fx(function)(x)
    for program in (traced, recorded):
        assert all(map(torch.equal, as_tuple(program(x + 1)), as_tuple(function(x + 1))))


@pytest.mark.parametrize("op", FACE)
def test_shapes_of_tensors_without_numbers(op: str) -> None:
    function, x = calls_of_the_face(op)
    shapes = [tuple(y.shape) for y in as_tuple(function(x))]
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        found = as_tuple(function(fakes.from_tensor(x)))
    assert [tuple(y.shape) for y in found] == shapes
    call = {name: y.to("meta") if isinstance(y, Tensor) else y for name, y in arguments(op).items()}
    assert [tuple(y.shape) for y in as_tuple(getattr(yoso_core, op)(**call))] == shapes


def test_compiled_code_that_takes_a_forward_derivative_is_refused() -> None:
    call = arguments("lsh_cumulation")

    def moved(x: Tensor) -> Any:
        return torch.func.jvp(lambda value: yoso_core.lsh_cumulation(**call | {"value": value}), (x,), (x,))

    with pytest.raises(Exception, match="carries a forward-mode derivative"):
        torch.compile(moved, backend="eager", fullgraph=True)(call["value"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("attend", [yoso_core.yoso_attention, yoso_attention], ids=["face", "torch"])
def test_nested_tensors_are_refused(attend: Callable[..., Tensor], layout: Any) -> None:
    nested = torch.nested.nested_tensor([torch.ones(4, 8), torch.ones(5, 8)], layout=layout)
    with pytest.raises(TypeError, match=r"^query: need a dense tensor, got a nested one; pad it"):
        attend(nested, nested, nested)
    if attend is yoso_core.yoso_attention:
        with pytest.raises(TypeError, match=r"^vectors: need a dense tensor"):
            yoso_core.fast_hash(nested, torch.ones(3, 1, 8, dtype=torch.int8), 1, 3)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_decides_the_dtype_whether_gradients_are_wanted_or_not(dtype: torch.dtype, requires_grad: bool) -> None:
    x = torch.randn(2, 6, 8).requires_grad_(requires_grad)
    with torch.autocast("cpu", dtype):
        assert yoso_core.yoso_attention(x, x, x, rng=0).dtype == dtype
        assert yoso_core.lsh_cumulation(*(torch.zeros(2, 6, 3, dtype=torch.int32),) * 2, x.detach(), 4).dtype == torch.float32


# The weights


@every_mode
@pytest.mark.parametrize("normalize_output", [True, False])
def test_weights_come_with_the_same_output_and_gradients(mode: dict[str, Any], normalize_output: bool) -> None:
    attend, vectors = problem(mode, normalize_output=normalize_output)
    options = dict(zip(attend.__code__.co_freevars, (cell.cell_contents for cell in attend.__closure__ or ()), strict=True))["options"]
    leaves = [x.clone().requires_grad_() for x in vectors]
    expected = attend(*leaves)
    out, weights = yoso_attention_with_weights(*leaves, **options)
    assert torch.equal(out, expected)
    weights.retain_grad()
    cotangent = normal(*out.shape, seed=9)
    right = torch.autograd.grad(expected, leaves, cotangent)
    out.backward(cotangent)
    torch.testing.assert_close([x.grad for x in leaves], list(right), rtol=1e-10, atol=1e-12)
    assert weights.grad is not None
    assert weights.grad.abs().max() > 0


def test_sampled_weights_are_mean_collisions() -> None:
    call = arguments("yoso_attention")
    out, weights = yoso_attention_with_weights(**call)
    numbers = call["signs"], call["num_hash"], call["hash_code_len"]
    query_code, key_code = (yoso_core.fast_hash(call[side], *numbers) for side in ("query", "key"))
    together = (query_code[..., :, None, :] == key_code[..., None, :, :]).float().mean(-1)
    kept = call["query_mask"][..., :, None] & call["key_mask"][..., None, :]
    torch.testing.assert_close(weights, together * kept, rtol=0, atol=1e-7)
    rows = torch.nn.functional.normalize(weights @ call["value"], dim=-1)
    torch.testing.assert_close(rows, out, rtol=1e-5, atol=1e-6)


def test_values_that_a_row_does_not_meet_do_not_spoil_it() -> None:
    call = arguments("yoso_attention", masked=False)
    call["value"][0, 0, 2] = torch.nan
    expected = yoso_attention(**call)
    assert torch.isnan(expected).any()
    assert torch.isfinite(expected).all(-1)[0, 0].any()
    out, _ = yoso_attention_with_weights(**call)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


# Whole models


def model_of(use_expectation: bool, *, layers: int = 4) -> YosoModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": layers, "intermediate_size": 32}
    hashes = {"num_hash": 8, "hash_code_len": 5, "use_expectation": use_expectation, "initializer_range": 0.2}
    return YosoModel(YosoConfig(**sizes, **hashes, max_position_embeddings=64)).eval()


@pytest.mark.parametrize("variant", [None, "numpy:formula", "emulated:shared_table"])
@pytest.mark.parametrize("use_expectation", [False, True])
def test_evaluation_has_the_same_bits_with_and_without_gradients(use_expectation: bool, variant: str | None) -> None:
    """The bits of a row flip hashes in the layers above it, so one ulp would show."""
    model = model_of(use_expectation, layers=4 if variant is None else 2)
    model.config.kernel_variant = variant
    ids = torch.randint(5, 90, (2, 40 if variant is None else 9))
    with torch.no_grad():
        without = model(ids, output_hidden_states=True).hidden_states
    recorded = model(ids, output_hidden_states=True).hidden_states
    looked_at = model(ids, output_hidden_states=True, output_attentions=True).hidden_states
    assert recorded[-1].requires_grad
    for x, y, z in zip(without, recorded, looked_at, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # torch looks at every property
@pytest.mark.parametrize("use_expectation", [False, True])
def test_a_traced_model_is_the_model_at_other_shapes_and_after_a_save(use_expectation: bool, tmp_path: Any) -> None:
    model = YosoForMaskedLM(model_of(use_expectation, layers=1).config).eval()
    model.config.return_dict = False
    traced = torch.jit.trace(model, (torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)))
    traced.save(str(tmp_path / "model.pt"))
    ids, mask = torch.randint(5, 90, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    mask[1, 5:] = 0
    for program in (traced, torch.jit.load(str(tmp_path / "model.pt"))):
        assert torch.equal(program(ids, mask)[0], model(ids, mask)[0])


@pytest.mark.parametrize("use_expectation", [False, True])
def test_forward_mode_of_a_model_is_the_transpose_of_its_backward_pass(use_expectation: bool) -> None:
    model = model_of(use_expectation, layers=2).double()
    embeddings = normal(2, 9, 32)
    out, moved = torch.func.jvp(lambda x: model(inputs_embeds=x).last_hidden_state, (embeddings,), (normal(2, 9, 32, seed=1),))
    _, pull_back = torch.func.vjp(lambda x: model(inputs_embeds=x).last_hidden_state, embeddings)
    cotangent = normal(*out.shape, seed=2)
    pairing = (pull_back(cotangent)[0] * normal(2, 9, 32, seed=1)).sum()
    torch.testing.assert_close((cotangent * moved).sum(), pairing, rtol=1e-9, atol=1e-9)
