"""Hashes by one chain of rotations: the definition bit by bit, what stays fixed when sizes change,
and the bias that it is made to avoid.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import yoso_core
from yoso_core import reference
from yoso_core.benchmarks import promise
from yoso_core.benchmarks.promise import Hash, Setting, drawn_codes
from yoso_core.model import YosoAttentionOptions, YosoConfig, YosoModel, enable_yoso_attention
from yoso_core.model.draws import evaluation_signs
from yoso_core.reference.arrays import Array
from yoso_core.reference.hashing import LAYOUTS, WARM_UP, Layout, chain_factor


def drawn(num_hash: int, tau: int, dim: int, *, rotations: int | None = None, layout: Layout = "chained", seed: int = 0) -> Array:
    return yoso_core.sample_signs(num_hash, tau, dim, layout=layout, rotations=rotations, rng=seed)


def vectors(n: int, dim: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((n, dim))


def bit_by_bit(x: Array, signs: Array, num_hash: int, tau: int) -> Array:
    """The definition again, by matrix products and single bits. Whole numbers, whose products are
    exact: no factor of a round is needed.
    """
    rounds, dim = signs.shape
    matrix = np.array([[(-1) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)], dtype=object)
    padded = [*map(int, x), *[0] * (dim - len(x))]
    y, stream = np.array(padded, dtype=object), []
    for r in range(rounds):
        y = matrix @ (y * signs[r].astype(int))
        if r >= 3:
            stream += [int(entry > 0) for entry in y]
    apart = (rounds - 3) * dim // tau
    return np.array([sum(stream[b * apart + h] << b for b in range(tau)) for h in range(num_hash)])


@pytest.mark.parametrize(
    ("dim", "tau", "num_hash", "rotations"),
    [(1, 3, 2, None), (2, 5, 4, None), (6, 4, 9, None), (8, 3, 5, 2), (16, 9, 7, 4), (20, 11, 3, None), (4, 30, 3, 23), (64, 8, 32, 4)],
)
def test_codes_are_the_definitions(dim: int, tau: int, num_hash: int, rotations: int | None) -> None:
    signs = drawn(num_hash, tau, dim, rotations=rotations)
    x = np.random.default_rng(2).integers(-9, 10, size=(5, dim)).astype(np.float64)
    x[1] = 0
    got = reference.fast_hash(x, signs, num_hash, tau, layout="chained")
    np.testing.assert_array_equal(got, [bit_by_bit(row, signs, num_hash, tau) for row in x])
    np.testing.assert_array_equal(got[1], 0)


GOLDEN: dict[Layout, list[list[int]]] = {
    "paper": [[20, 191, 60, 182], [148, 102, 122, 211], [187, 64, 66, 195]],
    "chained": [[138, 210, 143, 222], [199, 85, 57, 78], [85, 21, 120, 11]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_codes(layout: Layout) -> None:
    """Stored codes stay good: of these vectors, in every later version."""
    x = np.cos(np.arange(3 * 24, dtype=np.float32)).reshape(3, 24)
    rotations = 8 if layout == "chained" else None
    signs = yoso_core.sample_signs(4, 8, 24, layout=layout, rotations=rotations, rng=7)
    assert yoso_core.fast_hash(x, signs, 4, 8, layout=layout).tolist() == GOLDEN[layout]


def test_fewer_hashes_are_the_first_of_more() -> None:
    signs, x = drawn(32, 8, 64), vectors(9, 64)
    for num_hash in (1, 16, 31):
        few = yoso_core.fast_hash(x, signs, num_hash, 8, layout="chained")
        np.testing.assert_array_equal(few, yoso_core.fast_hash(x, signs, 32, 8, layout="chained")[:, :num_hash])


@pytest.mark.parametrize("dim", [2, 8, 32, 128, 512, 1024])
def test_six_hundred_rounds_stay_in_range(dim: int) -> None:
    """Codes do not depend on the scale of the input, down and up to the ends of the promise."""
    x = vectors(6, dim).astype(np.float32)
    signs = drawn(3, 8, dim, rotations=597)
    codes = yoso_core.fast_hash(x, signs, 3, 8, layout="chained")
    assert len(np.unique(codes)) > 1
    for scale in (2.0**-60, 2.0**60):
        scaled = (x / np.abs(x).max() * np.float32(scale)).astype(np.float32)
        np.testing.assert_array_equal(yoso_core.fast_hash(scaled, signs, 3, 8, layout="chained"), codes)


@pytest.mark.parametrize("dim", [1, 2, 4, 32, 64, 1024])
def test_two_rounds_keep_the_length(dim: int) -> None:
    """So the length stays within a factor of two for ever."""
    lengths = [math.prod(chain_factor(r, dim) * math.sqrt(dim) for r in range(1, rounds + 1)) for rounds in range(1, 9)]
    assert all(0.7 < length < 1.5 for length in lengths)
    assert lengths[1::2] == pytest.approx([1.0] * 4)


GOLDEN_ROTATIONS = {
    (32, 8): 7, (32, 9): 8, (32, 10): 10, (32, 11): 10, (32, 12): 11,
    (64, 8): 4, (64, 9): 5, (64, 10): 6, (64, 11): 7, (64, 12): 8,
    (128, 8): 3, (128, 9): 4, (128, 10): 4, (128, 11): 5, (128, 12): 6,
}  # fmt: skip


@pytest.mark.parametrize(("dim", "tau"), GOLDEN_ROTATIONS)
def test_golden_rotations(dim: int, tau: int) -> None:
    """Draws of a seed keep their shape; they follow the table up to the hashes that its rotations
    have room for, and the room beyond.
    """
    rotations = GOLDEN_ROTATIONS[dim, tau]
    assert reference.hashing.ROTATIONS[dim][tau] == rotations
    room = rotations * dim // tau
    assert room >= 8
    for d in (dim // 2 + 1, dim):
        for num_hash in (1, 7, 8, room):
            assert drawn(num_hash, tau, d).shape == (rotations + 3, dim)
        assert drawn(room + 1, tau, d).shape == (math.ceil((room + 1) * tau / dim) + 3, dim)


def test_the_docstring_shows_the_table() -> None:
    text = yoso_core.sample_signs.__doc__ or ""
    (heads,) = re.findall(r"(?m)^ *tau ((?: +\d+)+)$", text)
    shown = {
        int(dim): dict(zip(map(int, heads.split()), map(int, row.split()), strict=True))
        for dim, row in re.findall(r"D = (\d+) ((?: +\d+)+)\n", text)
    }
    assert shown == reference.hashing.ROTATIONS


@pytest.mark.parametrize(
    ("num_hash", "tau", "dim", "rotations"), [(64, 8, 16, 32), (8, 7, 64, 7), (8, 13, 64, 13), (8, 9, 256, 9), (3, 5, 1, 15)]
)
def test_outside_of_the_table_every_bit_has_a_rotation(num_hash: int, tau: int, dim: int, rotations: int) -> None:
    assert drawn(num_hash, tau, dim).shape == (rotations + 3, dim)


@pytest.mark.parametrize(("dim", "tau"), GOLDEN_ROTATIONS)
def test_more_hashes_never_share_more_rotations(dim: int, tau: int) -> None:
    """The bits of a code that share a rotation bias it; by the theory the bias of every number of
    hashes from 8 on stays within 0.95 of the promise.
    """
    for num_hash in range(8, 2 * dim):
        setting = Setting(dim, tau, num_hash)
        for cosine, bound in promise.BOUNDS.items():
            assert -0.95 * bound < promise.predicted(setting, cosine) <= 0


def test_how_many_rotations() -> None:
    assert drawn(32, 8, 64, rotations=5).shape == (5 + 3, 64)
    with pytest.raises(ValueError, match=r"^rotations: need an integer at least 4, got 3"):
        drawn(32, 8, 64, rotations=3)
    with pytest.raises(ValueError, match=r"^rotations: a chain has them, layout='paper' has parts"):
        drawn(32, 8, 64, layout="paper", rotations=4)
    with pytest.raises(ValueError, match=r"^layout: need one of 'chained', 'paper', got 'other'"):
        drawn(32, 8, 64, layout="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^signs: need shape \(\*batch, 8, 64\) \(at least 8 rounds"):
        yoso_core.fast_hash(vectors(2, 64), drawn(32, 8, 64, rotations=4), 33, 8, layout="chained")
    with pytest.raises(ValueError, match=r"^signs: need shape"):
        yoso_core.fast_hash(vectors(2, 64), drawn(32, 8, 64), 32, 8, layout="paper")
    with pytest.raises(ValueError, match=r"^signs: need shape"):
        yoso_core.fast_hash(vectors(2, 64), drawn(32, 8, 64, layout="paper"), 32, 8, layout="chained")


# The page of the documentation


def page() -> str:
    return (Path(__file__).parents[1] / "docs" / "hashing.md").read_text("utf-8")


def test_the_lines_of_the_page_run() -> None:
    (program,) = re.findall(r"(?ms)^```python\n(.*?)^```$", page())
    names: dict[str, Array] = {}
    exec(compile(program, "hashing.md", "exec"), names)
    assert names["out"].shape == (512, 64)
    assert names["codes"].shape == (512, 64)


def test_its_formula_gives_its_numbers() -> None:
    text = page()
    assert "exp(-(2 / pi)**2 tau (tau - 1) / (2 (D - 1)))" in text
    given = re.findall(r"-(\d+)% at\s+`D = (\d+)`,\s+`tau = (\d+)`", text)
    assert len(given) == 3
    for percent, dim, tau in ([int(x) for x in row] for row in given):
        assert percent == round(100 - 100 * math.exp(-((2 / math.pi) ** 2) * tau * (tau - 1) / (2 * (dim - 1))))


# Attention and models


@pytest.mark.parametrize("requires_grad", [False, True])
def test_attention_draws_and_takes_a_chain(requires_grad: bool) -> None:
    x = torch.from_numpy(vectors(9, 16)).float().requires_grad_(requires_grad)
    options = {"num_hash": 5, "hash_code_len": 4, "layout": "chained"}
    for rotations in (None, 2):
        signs = torch.from_numpy(drawn(5, 4, 16, rotations=rotations))
        given = yoso_core.yoso_attention(x, x, x, signs=signs, **options)
        assert torch.equal(given, yoso_core.yoso_attention(x, x, x, rng=0, rotations=rotations, **options))
    with pytest.raises(ValueError, match=r"^rotations: need an integer at least 2, got 1"):
        yoso_core.yoso_attention(x, x, x, rng=0, rotations=1, **options)
    with pytest.raises(ValueError, match=r"^rotations: a chain has them"):
        yoso_core.yoso_attention(x, x, x, rng=0, num_hash=5, hash_code_len=4, rotations=2, layout="paper")


def test_gradients_are_those_of_the_codes() -> None:
    x = torch.from_numpy(vectors(9, 16)).requires_grad_()
    signs = torch.from_numpy(drawn(5, 4, 16))
    out = yoso_core.yoso_attention(x, x, x, num_hash=5, hash_code_len=4, signs=signs, layout="chained", normalize_output=False)
    grad_out = torch.from_numpy(vectors(9, 16, seed=2))
    (grad,) = torch.autograd.grad(out, x, grad_out)
    plain = x.detach()
    codes = yoso_core.fast_hash(plain, signs, 5, 4, layout="chained")
    expected = sum(yoso_core.lsh_attention_backward(grad_out, plain, plain, plain, codes, codes, 4))
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


SIZES = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}


def test_a_model_of_chains(tmp_path: Path) -> None:
    """Its evaluation repeats, after a save too; it trains; and it is another one than that of the
    paper's layout.
    """
    torch.manual_seed(0)
    config = YosoConfig(**SIZES, use_expectation=False, num_hash=6, hash_code_len=4, hash_layout="chained", rotations=3)
    model = YosoModel(config).eval()
    ids = torch.randint(2, 60, (2, 12))
    out = model(ids).last_hidden_state
    model.save_pretrained(tmp_path)
    assert torch.equal(YosoModel.from_pretrained(tmp_path).eval()(ids).last_hidden_state, out)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).last_hidden_state, out, rtol=0, atol=0)
    model.train()(ids).last_hidden_state.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval().config.rotations = None
    assert not torch.equal(model(ids).last_hidden_state, out)
    model.config.rotations = 1
    with pytest.raises(ValueError, match=r"^rotations: need an integer at least 3, got 1"):
        model(ids)
    model.config.rotations, model.config.hash_layout = None, "paper"
    assert not torch.equal(model(ids).last_hidden_state, out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hash_layout": "other"}, "^hash_layout: need one of"),
        ({"hash_layout": "paper", "rotations": 4}, "^rotations: a chain has them, hash_layout='paper' has parts"),
        ({"hash_layout": "chained", "rotations": 0}, "^rotations: need an integer at least 1"),
    ],
)
@pytest.mark.parametrize("kind", [YosoConfig, YosoAttentionOptions])
def test_wrong_settings(kind: Callable[..., object], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_an_encoder_of_chains() -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    ids, found = torch.randint(2, 60, (2, 12)), []
    for options in ({"hash_layout": "paper"}, {}, {"rotations": 3}):
        enable_yoso_attention(YosoAttentionOptions(num_hash=6, hash_code_len=4, **options), model=model)
        found.append(model(ids).last_hidden_state)
        assert torch.equal(found[-1], model(ids).last_hidden_state)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("rotations", [None, 4])
def test_the_draws_of_evaluation_are_the_bits_of_pcg64(rotations: int | None) -> None:
    signs = evaluation_signs(7, 3, 2, 8, 4, 12, "chained", rotations)
    assert signs.shape == (2, (4 if rotations is None else rotations) + 3, 16)
    for head in (0, 1):
        words = np.random.PCG64(np.random.SeedSequence([7, 3, head])).random_raw(2)
        bits = [int(words[i // 64]) >> i % 64 & 1 for i in range(7 * 16)]
        assert signs[head].flatten().tolist() == [2 * bit - 1 for bit in bits]
    call = ("signs", 7, 3, 2, 8, 4, 12, torch.device("cpu"), "chained", rotations)
    assert torch.equal(torch.ops.yoso_core.evaluation_draw(*call), signs)
    torch.library.opcheck(torch.ops.yoso_core.evaluation_draw.default, call)


# Bias: what the default rotations promise

Codes = Callable[[Hash, Setting, Array, np.random.Generator], Array]


def check_promise(kind: str, setting: Setting, cosine: float) -> tuple[bool, float]:
    """Whether the mean collision weight of all hashes, relative to the expected one, is within its
    bound and three standard errors; and the bias.
    """
    bound = promise.BOUNDS[cosine]
    groups = promise.groups_for(setting, cosine, bound / 4, num_hash=setting.num_hash)
    found = promise.collisions("chained", kind, setting, cosine, groups=groups)
    bias, error = promise.relative(found[:, 1], cosine, setting.hash_code_len)
    assert error < bound / 2
    return abs(bias) < bound + 3 * error, bias


CELLS = [Setting(32, 9, 28), Setting(64, 8, 32), Setting(128, 8, 48)]
"""One for each dimension, at the rotations of the table, of which these hashes use every bit."""


@pytest.mark.parametrize("cosine", promise.ENDS)
@pytest.mark.parametrize("kind", ["Gaussian", "one-hot"])
@pytest.mark.parametrize("setting", CELLS, ids=lambda s: f"d{s.dim}-tau{s.hash_code_len}-m{s.num_hash}")
def test_default_rotations_keep_the_promise(setting: Setting, kind: str, cosine: float) -> None:
    within, bias = check_promise(kind, setting, cosine)
    assert within, bias


@pytest.mark.parametrize(("dim", "said"), [(2, 7.5), (4, 0.59), (8, 0.0)])
def test_few_dimensions_need_planes(dim: int, said: float) -> None:
    """The relative biases that `docs/hashing.md` names, at a cosine of 0.5."""
    setting = Setting(dim, 8, 8)
    found = promise.collisions("chained", "Gaussian", setting, 0.5, groups=128)
    bias, error = promise.relative(found[:, 1], 0.5, 8)
    assert abs(bias - said) < 0.02 + 4 * error
    planes = promise.collisions("planes", "Gaussian", setting, 0.5, groups=128)
    bias, error = promise.relative(planes[:, 1], 0.5, 8)
    assert abs(bias) < 4 * error


def bits_of_one_block(hash: Hash, setting: Setting, vectors: Array, rng: np.random.Generator) -> Array:
    """The paper's layout."""
    return drawn_codes("paper", setting, vectors, rng)


def with_signs(spoil: Callable[[Array, Array], tuple[Array, Array]]) -> Codes:
    """A twin that takes other vectors and signs than those that it is given."""

    def codes(hash: Hash, setting: Setting, vectors: Array, rng: np.random.Generator) -> Array:
        numbers = setting.num_hash, setting.hash_code_len
        signs = yoso_core.sample_signs(*numbers, setting.dim, batch_shape=vectors.shape[:1], layout="chained", rng=rng)
        return yoso_core.fast_hash(*spoil(vectors, signs), *numbers, layout="chained")

    codes.__name__ = spoil.__name__
    return codes


@with_signs
def reads_from_the_first_round(vectors: Array, signs: Array) -> tuple[Array, Array]:
    """Four transforms in a row change nothing, so the fourth round is the first with signs."""
    bare = signs.copy()
    bare[:, :WARM_UP] = 1
    return reference.hadamard_transform(vectors), bare


@with_signs
def uses_one_diagonal_throughout(vectors: Array, signs: Array) -> tuple[Array, Array]:
    return vectors, np.repeat(signs[:, :1], signs.shape[1], axis=1)


@with_signs
def multiplies_by_a_diagonal_twice(vectors: Array, signs: Array) -> tuple[Array, Array]:
    """In one round. Its signs cancel, and its bits are those of two rounds before."""
    bare = signs.copy()
    bare[:, 6] = 1
    return vectors, bare


@pytest.mark.parametrize(
    ("twin", "kind"),
    [
        (bits_of_one_block, "Gaussian"),
        (reads_from_the_first_round, "one-hot"),
        (uses_one_diagonal_throughout, "Gaussian"),
        (multiplies_by_a_diagonal_twice, "Gaussian"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_the_check_rejects_a_biased_twin(monkeypatch: pytest.MonkeyPatch, twin: Codes, kind: str) -> None:
    """At the paper's setting for the Long Range Arena, where every bit of a code has a rotation of
    its own.
    """
    setting = Setting(32, 11, 32)
    assert check_promise(kind, setting, 0.5)[0]
    monkeypatch.setattr(promise, "drawn_codes", twin)
    within, bias = check_promise(kind, setting, 0.5)
    assert not within, bias
