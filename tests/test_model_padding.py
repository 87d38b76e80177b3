"""A padded batch gives each row what it would get alone, evaluation repeats, training draws afresh,
and nothing turns into NaN.

The last tests show what transformers' YOSO does in the same places.
"""

from typing import Any

import numpy as np
import pytest
import torch
from model_support import WAYS, close, gradients, ids, lively, stock
from torch import Tensor
from torch.nn import functional as F

from yoso_core.model import YosoModel
from yoso_core.model.draws import evaluation_draw, evaluation_planes, evaluation_signs
from yoso_core.reference.hashing import fast_hash, signs_shape

LENGTHS = (17, 1, 9, 16)
BATCH, N = len(LENGTHS), max(LENGTHS)
RIGHT = torch.arange(N) < torch.tensor(LENGTHS)[:, None]
"""True for tokens, with padding on the right."""

every_way = pytest.mark.parametrize("way", WAYS)
with_and_without_convolution = pytest.mark.parametrize("conv_window", [None, 5], ids="conv{}".format)


def padded(words: Tensor, keep: Tensor, fill: int = 1) -> Tensor:
    return words.masked_fill(~keep, fill)


def alone(model: Any, words: Tensor, keep: Tensor) -> list[Tensor]:
    """The last hidden states of every row, each run by itself, cut to its tokens."""
    with torch.no_grad():
        return [model(row[kept][None]).last_hidden_state[0] for row, kept in zip(words, keep, strict=True)]


# Padded = truncated


@every_way
@with_and_without_convolution
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_row_is_what_it_is_alone(side: str, conv_window: int | None, way: str) -> None:
    """In float64, where no code differs: matrix products of another shape round differently, and a
    bit may turn over where a projection is nearly zero.
    """
    model = lively("YosoModel", conv_window=conv_window, **WAYS[way]).double()
    keep = RIGHT if side == "right" else RIGHT.flip(1)
    words = padded(ids(BATCH, N), keep)
    # The first token stands at row 2 in every line.
    positions = {} if side == "right" else {"position_ids": (keep.cumsum(1) + 1).clamp_min(2)}
    with torch.no_grad():
        got = model(words, attention_mask=keep.long(), **positions).last_hidden_state
    for row, kept, expected in zip(got, keep, alone(model, words, keep), strict=True):
        close(row[kept], expected, 1e-12)


@pytest.mark.parametrize("way", ["expectation"])
@with_and_without_convolution
def test_a_padded_row_is_what_it_is_alone_in_float32(way: str, conv_window: int | None) -> None:
    model = lively("YosoModel", conv_window=conv_window, **WAYS[way])
    words = padded(ids(BATCH, N), RIGHT)
    with torch.no_grad():
        got = model(words, attention_mask=RIGHT.long()).last_hidden_state
    for row, kept, expected in zip(got, RIGHT, alone(model, words, RIGHT), strict=True):
        close(row[kept], expected)


@pytest.mark.parametrize("way", ["sampled", "planes"])
def test_a_padded_row_in_float32_has_the_codes_that_it_has_alone(way: str) -> None:
    """At most 1 bit of 100,000 may differ, and where all of a layer's do agree, so does what it
    gives.
    """
    settings = {"num_hash": 64, "hash_code_len": 9, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 128}
    model = lively("YosoModel", **WAYS[way] | settings)
    attention = model.encoder.layer[0].attention.self
    lengths = torch.tensor([128, 5, 100, 127])
    keep = torch.arange(128) < lengths[:, None]
    words = padded(ids(4, 128), keep)
    if way == "sampled":
        signs = evaluation_signs(0, 0, 2, 64, 9, 32).numpy()
    else:
        planes = evaluation_planes(0, 0, 2, 64, 9, 32)

    def bits(hidden: Tensor) -> Tensor:
        """``(2, rows, heads, n, m, tau)``"""
        vectors = torch.stack([p(hidden).unflatten(-1, (2, 32)).transpose(1, 2) for p in (attention.query, attention.key)])
        if way == "planes":
            return (vectors @ planes > 0).unflatten(-1, (64, 9))
        codes = torch.from_numpy(fast_hash(vectors.numpy(), signs, 64, 9))
        return (codes[..., None] >> torch.arange(9)) & 1

    total, wrong = 0, 0
    with torch.no_grad():
        together = model.embeddings(words)
        context = attention(together, keep)[0]
        for i, n in enumerate(lengths.tolist()):
            by_itself = model.embeddings(words[i : i + 1, :n])
            close(by_itself[0], together[i, :n])
            differ = bits(by_itself)[:, 0] != bits(together)[:, i, :, :n]
            total, wrong = total + differ.numel(), wrong + int(differ.sum())
            if not differ.any():
                close(context[i, :n], attention(by_itself)[0][0])
    assert total > 800_000
    assert wrong <= total / 100_000


DEEP = {"num_hidden_layers": 12, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 24, "num_hash": 16}


@pytest.mark.parametrize(
    ("way", "dtype", "tolerance"),
    [("expectation", torch.float32, 1e-5), ("expectation", torch.float64, 1e-12), ("sampled", torch.float64, 1e-12)],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_in_twelve_layers_a_padded_row_is_what_it_is_alone(way: str, dtype: torch.dtype, tolerance: float) -> None:
    """Of sampling in float32 nothing is promised beyond the first layer."""
    model = lively("YosoModel", **DEEP | WAYS[way]).to(dtype)
    words = padded(ids(BATCH, N), RIGHT)
    with torch.no_grad():
        got = model(words, attention_mask=RIGHT).last_hidden_state
    for row, kept, expected in zip(got, RIGHT, alone(model, words, RIGHT), strict=True):
        close(row[kept], expected, tolerance)


@every_way
def test_in_twelve_layers_of_float32_rows_of_one_shape_are_the_same(way: str) -> None:
    """Bit for bit, whatever the other rows hold: at one shape matrix products round alike."""
    model = lively("YosoModel", **DEEP | WAYS[way])
    words, others = ids(BATCH, N), ids(BATCH, N, seed=5)
    others[0] = words[0]
    keep = RIGHT.clone()
    keep[0], keep[1:] = torch.arange(N) < 13, keep[1:].flip(0)
    mask = RIGHT.clone()
    mask[0] = keep[0]
    with torch.no_grad():
        first = model(words, attention_mask=mask).last_hidden_state[0, :13]
        second = model(others, attention_mask=keep).last_hidden_state[0, :13]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@every_way
def test_what_stands_at_padding_does_not_matter(way: str) -> None:
    """Not even which words, which positions or how they are counted; bit for bit, since the shape
    is the same.
    """
    model = lively("YosoModel", conv_window=5, **WAYS[way])
    words = ids(BATCH, N)
    with torch.no_grad():
        first = model(padded(words, RIGHT), attention_mask=RIGHT.long()).last_hidden_state[RIGHT]
        second = model(padded(words, RIGHT, 7), attention_mask=RIGHT).last_hidden_state[RIGHT]
        third = model(padded(words, RIGHT, 9), attention_mask=RIGHT.float()).last_hidden_state[RIGHT]
        unmasked = model(padded(words, RIGHT)).last_hidden_state[RIGHT]
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(third, first, rtol=0, atol=0)
    assert (unmasked - first).abs().max() > 1e-3


MASKS = {
    "of_bool": lambda keep: keep,
    "of_int8": lambda keep: keep.to(torch.int8),
    "of_scores": lambda keep: keep[:, None, None],
    "of_scores_as_numbers": lambda keep: keep[:, None, None].float(),
}


@every_way
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_may_have_every_form_that_bert_takes(kind: str, way: str) -> None:
    model = lively("YosoForTokenClassification", conv_window=5, **WAYS[way])
    words, labels = padded(ids(BATCH, N), RIGHT), {"labels": ids(BATCH, N, seed=1) % 2}
    with torch.no_grad():
        expected = model(words, attention_mask=RIGHT.long(), **labels)
        got = model(words, attention_mask=MASKS[kind](RIGHT), **labels)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=0)


@every_way
@pytest.mark.parametrize("form", [(1, N), (1, 1, 1, N)], ids=str)
def test_a_mask_of_one_row_is_that_of_every_text(form: tuple[int, ...], way: str) -> None:
    model = lively("YosoForTokenClassification", conv_window=5, **WAYS[way])
    words, labels = ids(BATCH, N), {"labels": ids(BATCH, N, seed=1) % 2}
    row = torch.arange(N) < 9
    choices = lively("YosoForMultipleChoice", **WAYS[way])
    with torch.no_grad():
        expected = model(words, attention_mask=row.expand(BATCH, N), **labels)
        got = model(words, attention_mask=row.reshape(form), **labels)
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=0)
        torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=0)
        assert (got.logits[:, :9] - model(words).logits[:, :9]).abs().max() > 1e-3
        positions = torch.arange(N)[None, None] + 4
        scores = choices(words[None], attention_mask=row.reshape(1, *form), position_ids=positions).logits
        alike = {"attention_mask": row.expand(1, BATCH, N), "position_ids": positions.expand(1, BATCH, N)}
        torch.testing.assert_close(scores, choices(words[None], **alike).logits, rtol=0, atol=0)


@every_way
def test_padding_of_ids_is_padding_of_embeddings(way: str) -> None:
    """Its rows have no meaning, but they are the same, whatever stood there."""
    model = lively("YosoModel", conv_window=5, **WAYS[way])
    words = padded(ids(BATCH, N), RIGHT)
    embeds = model.get_input_embeddings()(words)
    with torch.no_grad():
        expected = model(words, attention_mask=RIGHT, output_hidden_states=True).hidden_states
        for given in (embeds, embeds.masked_fill(~RIGHT[..., None], torch.nan)):
            for x, y in zip(
                model(inputs_embeds=given, attention_mask=RIGHT, output_hidden_states=True).hidden_states, expected, strict=True
            ):
                torch.testing.assert_close(x, y, rtol=0, atol=0)


@every_way
@with_and_without_convolution
def test_padding_may_hold_nan(conv_window: int | None, way: str) -> None:
    model = lively("YosoModel", conv_window=conv_window, **WAYS[way])
    embeds = model.get_input_embeddings()(ids(BATCH, N)).detach()
    with torch.no_grad():
        right = model(inputs_embeds=embeds, attention_mask=RIGHT.long()).last_hidden_state[RIGHT]
        for bad in (torch.nan, torch.inf):
            spoiled = embeds.masked_fill(~RIGHT[..., None], bad)
            got = model(inputs_embeds=spoiled, attention_mask=RIGHT.long()).last_hidden_state[RIGHT]
            torch.testing.assert_close(got, right, rtol=0, atol=0)
            assert model(inputs_embeds=spoiled).last_hidden_state[RIGHT].isnan().any()  # unmasked it shows


@every_way
@pytest.mark.parametrize("head", ["YosoForTokenClassification", "YosoForMaskedLM"])
def test_padding_may_hold_nan_in_training(head: str, way: str) -> None:
    model = lively(head, conv_window=3, num_labels=3, **WAYS[way])
    labels = (ids(BATCH, N, seed=1) % 3).masked_fill(~RIGHT, -100)
    embeds = model.get_input_embeddings()(ids(BATCH, N)).detach()
    found = []
    for fill in (0.0, torch.nan):
        model.zero_grad()
        given = embeds.masked_fill(~RIGHT[..., None], fill).requires_grad_()
        model(inputs_embeds=given, attention_mask=RIGHT.long(), labels=labels).loss.backward()
        found.append(gradients(model) | {"inputs_embeds": given.grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=0)
    assert not found[1]["inputs_embeds"][~RIGHT].any()
    assert found[1]["inputs_embeds"][RIGHT].any()


@every_way
def test_gradients_of_a_padded_batch_are_those_of_its_rows(way: str) -> None:
    model = lively("YosoForTokenClassification", conv_window=5, num_labels=3, **WAYS[way]).double()
    words, labels = padded(ids(BATCH, N), RIGHT), ids(BATCH, N, seed=1) % 3
    model(words, attention_mask=RIGHT.long(), labels=labels).loss.backward()
    together = gradients(model)
    model.zero_grad()
    for row, label, n in zip(words, labels, LENGTHS, strict=True):
        (model(row[None, :n], labels=label[None, :n]).loss * n / sum(LENGTHS)).backward()
    for name, grad in gradients(model).items():
        close(together[name], grad, 1e-11)


@every_way
@pytest.mark.parametrize("head", ["YosoForSequenceClassification", "YosoForMultipleChoice", "YosoForQuestionAnswering"])
def test_heads_hand_the_mask_on(head: str, way: str) -> None:
    model = lively(head, **WAYS[way]).double()
    choices = (1,) if head == "YosoForMultipleChoice" else ()
    words = padded(ids(BATCH, N), RIGHT)
    with torch.no_grad():
        got = model(words.view(BATCH, *choices, N), attention_mask=RIGHT.long().view(BATCH, *choices, N))[0]
        for i, n in enumerate(LENGTHS):
            expected = model(words[i, :n].view(1, *choices, n))[0][0]
            close(got[i, :n] if "Answering" in head else got[i], expected, 1e-12)


@every_way
def test_a_row_that_is_all_padding_leaves_the_others_alone(way: str) -> None:
    model = lively("YosoModel", conv_window=3, **WAYS[way])
    words, keep = ids(2, 6), torch.tensor([[1] * 6, [0] * 6])
    with torch.no_grad():
        got = model(words, attention_mask=keep).last_hidden_state
        expected = model(words, attention_mask=torch.ones_like(keep)).last_hidden_state
    assert got.isfinite().all()
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)


# Evaluation repeats


@every_way
def test_neighbors_in_the_batch_do_not_matter(way: str) -> None:
    model = lively("YosoModel", conv_window=5, **WAYS[way]).double()
    words = ids(BATCH, N)
    with torch.no_grad():
        together = model(words).last_hidden_state
        others = torch.cat([words[:1], ids(BATCH - 1, N, seed=5)])
        close(model(others).last_hidden_state[0], together[0], 1e-12)
        close(model(words[:1]).last_hidden_state[0], together[0], 1e-12)
        order = torch.tensor([2, 0, 3, 1])
        close(model(words[order]).last_hidden_state, together[order], 1e-12)


@every_way
def test_evaluation_repeats_and_draws_nothing(way: str) -> None:
    words = ids(2, N)
    model = lively("YosoModel", **WAYS[way])
    with torch.no_grad():
        first = model(words).last_hidden_state
        torch.manual_seed(12345)
        state = torch.get_rng_state()
        again = model(words).last_hidden_state
        assert (torch.get_rng_state() == state).all()
        twin = YosoModel(model.config).eval()
        twin.load_state_dict(model.state_dict())
        of_the_twin = twin(words).last_hidden_state
    for other in (again, of_the_twin):
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["sampled", "planes"])
def test_hashes_are_no_part_of_the_weights(way: str) -> None:
    model = lively("YosoModel", **WAYS[way])
    with torch.no_grad():
        before = set(model.state_dict())
        model(ids(2, N))
    assert set(model.state_dict()) == before == set(lively("YosoModel").state_dict())
    assert not list(model.buffers())


@pytest.mark.parametrize("way", ["sampled", "planes"])
def test_inference_mode_first_does_not_spoil_training(way: str) -> None:
    """Evaluation hashes are kept; those first used in inference mode must still serve where
    gradients are wanted.
    """
    model = lively("YosoForMaskedLM", hash_seed=987_654, **WAYS[way])
    with torch.inference_mode():
        first = model(ids(2, N)).logits
    output = model(ids(2, N), labels=ids(2, N))
    close(output.logits.detach(), first.clone())
    output.loss.backward()
    assert gradients(model)["yoso.encoder.layer.0.attention.self.query.weight"].any()


# The draw of evaluation, pinned

SIGNS = {
    (0, 0, 0): "+++++-+--+-----+",
    (0, 0, 1): "----+-+---+---++",
    (0, 1, 0): "+-+--+---++-+---",
    (7, 11, 2): "-+-+++-+-+---+--",
}
"""By hash seed, layer and head: the first sixteen signs of D1."""

PLANES = {(0, 0, 0): [-0.1177767, 0.9424543, 2.5141597, 0.2620285], (7, 11, 2): [-1.2163843, 0.9719455, 0.2895378, 0.140605]}
"""The first four numbers."""


def words_of(hash_seed: int, layer: int, head: int, count: int) -> list[int]:
    """The outputs of PCG64 (XSL-RR 128/64), stepped here in Python's whole numbers from the seeded
    state.

    Source: O'Neill 2014, "PCG: a family of simple fast space-efficient statistically good
    algorithms for random number generation".
    """
    seeded = np.random.PCG64(np.random.SeedSequence([hash_seed, layer, head])).state["state"]
    state, increment = int(seeded["state"]), int(seeded["inc"])
    found = []
    for _ in range(count):
        state = (state * 0x2360ED051FC65DA44385DF649FCCF645 + increment) % (1 << 128)
        mixed, turn = (state >> 64) ^ (state & (1 << 64) - 1), state >> 122
        found.append((mixed >> turn | mixed << (64 - turn)) % (1 << 64))
    return found


@pytest.mark.parametrize("hash_seed", [0, 7])
@pytest.mark.parametrize(("num_hash", "hash_code_len", "dim"), [(8, 4, 12), (64, 9, 64), (3, 20, 10)], ids=str)
def test_evaluation_signs_are_the_bits_of_pcg64(num_hash: int, hash_code_len: int, dim: int, hash_seed: int) -> None:
    signs = evaluation_signs(hash_seed, 3, 2, num_hash, hash_code_len, dim)
    padded_dim = 16 if dim < 16 else 64
    assert signs.dtype == torch.int8
    assert signs.shape == (2, *signs_shape(num_hash, hash_code_len, dim, "chained"))
    assert signs.shape[-1] == padded_dim
    for head in (0, 1):
        flat = signs[head].flatten().tolist()
        words = words_of(hash_seed, 3, head, -(-len(flat) // 64))
        assert flat == [1 if words[i // 64] >> (i % 64) & 1 else -1 for i in range(len(flat))]


def test_evaluation_planes_are_normal_numbers_from_pcg64() -> None:
    planes = evaluation_planes(7, 3, 2, 3, 5, 7)  # 105 numbers a head: the last of a pair is left over
    assert planes.dtype == torch.float32
    assert planes.shape == (2, 7, 15)
    for head in (0, 1):
        uniform = [((word >> 11) + 0.5) / 2**53 for word in words_of(7, 3, head, 106)]
        u, v = np.array(uniform[0::2]), np.array(uniform[1::2])
        pairs = np.sqrt(-2 * np.log(u))[:, None] * np.stack([np.cos(2 * np.pi * v), np.sin(2 * np.pi * v)], axis=1)
        torch.testing.assert_close(planes[head].flatten(), torch.from_numpy(pairs.flatten()[:105]).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("at", SIGNS, ids=str)
def test_golden_signs(at: tuple[int, int, int]) -> None:
    """A checkpoint's evaluation must give tomorrow, and elsewhere, what it gives today."""
    hash_seed, layer, head = at
    signs = evaluation_signs(hash_seed, layer, 3, 64, 9, 64)
    assert "".join("+" if sign > 0 else "-" for sign in signs[head].flatten()[:16].tolist()) == SIGNS[at]


@pytest.mark.parametrize("at", PLANES, ids=str)
def test_golden_planes(at: tuple[int, int, int]) -> None:
    hash_seed, layer, head = at
    planes = evaluation_planes(hash_seed, layer, 3, 64, 9, 64)
    torch.testing.assert_close(planes[head, 0, :4], torch.tensor(PLANES[at]), rtol=1e-6, atol=1e-7)


def test_draws_of_evaluation_are_fair_and_unrelated() -> None:
    """Signs and normal numbers have the right moments; those of heads, layers and seeds do not
    correlate. Within 4.5 standard errors.
    """
    heads = [evaluation_signs(seed, layer, 2, 64, 9, 64)[head].flatten() for seed in (0, 1) for layer in (0, 1) for head in (0, 1)]
    signs = torch.stack(heads).double()
    assert signs.abs().eq(1).all()
    size = signs.shape[1]
    correlations = signs @ signs.T / size - torch.eye(8)
    assert correlations.abs().max() < 4.5 / size**0.5
    assert signs.mean(1).abs().max() < 4.5 / size**0.5
    planes = torch.stack([evaluation_planes(0, layer, 2, 16, 8, 32)[head].flatten() for layer in (0, 1) for head in (0, 1)]).double()
    size = planes.shape[1]
    assert planes.mean(1).abs().max() < 4.5 / size**0.5
    assert (planes.square().mean(1) - 1).abs().max() < 4.5 * (2 / size) ** 0.5
    assert (planes.pow(4).mean(1) - 3).abs().max() < 4.5 * (96 / size) ** 0.5
    assert (planes @ planes.T / size).fill_diagonal_(0).abs().max() < 4.5 / size**0.5


@pytest.mark.parametrize("kind", ["signs", "planes"])
def test_the_kept_draw_is_the_draw(kind: Any) -> None:
    cpu = torch.device("cpu")
    drawn = (evaluation_signs if kind == "signs" else evaluation_planes)(3, 1, 2, 8, 4, 12)
    first = evaluation_draw(kind, 3, 1, 2, 8, 4, 12, cpu)
    torch.testing.assert_close(first, drawn, rtol=0, atol=0)
    assert evaluation_draw(kind, 3, 1, 2, 8, 4, 12, cpu) is first
    in_compiled_code = torch.ops.yoso_core.evaluation_draw(kind, 3, 1, 2, 8, 4, 12, cpu)
    torch.testing.assert_close(in_compiled_code, drawn, rtol=0, atol=0)
    assert in_compiled_code.data_ptr() != first.data_ptr()
    torch.library.opcheck(torch.ops.yoso_core.evaluation_draw.default, (kind, 3, 1, 2, 8, 4, 12, cpu))


# Training draws afresh

NO_DROPOUT = {"hidden_dropout_prob": 0.0}


@pytest.mark.parametrize("way", ["sampled", "planes"])
def test_training_draws_fresh_hashes_from_torchs_generator(way: str) -> None:
    model = lively("YosoModel", **WAYS[way], **NO_DROPOUT)
    words = ids(2, N)
    with torch.no_grad():
        evaluated = model(words).last_hidden_state
        model.train()
        torch.manual_seed(0)
        first, second = model(words).last_hidden_state, model(words).last_hidden_state
        torch.manual_seed(0)
        again = model(words).last_hidden_state
        torch.manual_seed(1)
        third = model(words).last_hidden_state
        evaluated_again = model.eval()(words).last_hidden_state
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(evaluated_again, evaluated, rtol=0, atol=0)
    for other in (second, third, evaluated):
        assert (other - first).abs().max() > 1e-3


def test_training_with_the_expectation_draws_nothing() -> None:
    model = lively("YosoModel", **NO_DROPOUT)
    evaluated = model(ids(2, N)).last_hidden_state
    torch.manual_seed(0)
    state = torch.get_rng_state()
    torch.testing.assert_close(model.train()(ids(2, N)).last_hidden_state, evaluated, rtol=0, atol=0)
    assert (torch.get_rng_state() == state).all()


@pytest.mark.parametrize("way", ["sampled", "planes"])
def test_layers_and_heads_draw_apart_in_training(way: str) -> None:
    """A layer whose heads have the same weights gives each head another context."""
    model = lively("YosoModel", **WAYS[way], **NO_DROPOUT).train()
    attention = model.encoder.layer[0].attention.self
    with torch.no_grad():
        for projection in (attention.query, attention.key, attention.value):
            projection.weight.copy_(projection.weight[:12].repeat(3, 1))
            projection.bias.copy_(projection.bias[:12].repeat(3))
        context = attention(model.embeddings(ids(2, N)))[0].unflatten(-1, (3, 12))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (context[:, :, i] - context[:, :, j]).abs().max() > 1e-2


@every_way
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # the name that every version of transformers knows
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["without_reentrance", "reentrant"])
@pytest.mark.parametrize("lsh_backward", [True, False], ids=["lsh", "dense"])
def test_gradient_checkpointing_gives_the_same_gradients(lsh_backward: bool, use_reentrant: bool, way: str) -> None:
    """With dropout and fresh hashes: what is computed again sees the draws of the first time."""
    model = lively("YosoForMaskedLM", conv_window=3, lsh_backward=lsh_backward, **WAYS[way]).train()
    words, labels = padded(ids(BATCH, N), RIGHT), ids(BATCH, N, seed=1)
    calls: list[None] = []
    model.yoso.encoder.layer[1].attention.self.register_forward_hook(lambda *_: calls.append(None))

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        calls.clear()
        torch.manual_seed(0)
        loss = model(words, attention_mask=RIGHT.long(), labels=labels).loss
        loss.backward()
        return loss.detach(), gradients(model)

    loss, right = step()
    assert len(calls) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    loss_again, again = step()
    assert len(calls) == 2
    close(loss_again, loss, 1e-6)
    assert again.keys() == right.keys()
    for name, grad in right.items():
        close(again[name], grad, 1e-6)  # weights that are used twice are added up in another order
    model.gradient_checkpointing_disable()
    step()
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("way", ["sampled", "planes"])
def test_the_comparison_of_gradients_sees_other_hashes(way: str) -> None:
    """Its twin: the generator is not put back before the layer is computed again."""
    model = lively("YosoForMaskedLM", **WAYS[way], **NO_DROPOUT).train()
    found = []
    for preserve in (True, False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": preserve})
        model.zero_grad()
        torch.manual_seed(0)
        model(ids(BATCH, N), labels=ids(BATCH, N, seed=1)).loss.backward()
        found.append(gradients(model)["yoso.encoder.layer.0.attention.self.query.weight"])
    assert (found[0] - found[1]).abs().max() > 1e-4


# Half precision, zeros, repetition

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALF
@with_and_without_convolution
def test_the_expectation_in_half_precision_is_near_float32(conv_window: int | None, dtype: torch.dtype) -> None:
    """Twenty roundings of a unit's size in each of two layers, and never as far off as another
    attention would be.
    """
    model = lively("YosoForMaskedLM", conv_window=conv_window).to(dtype).float()
    words = padded(ids(BATCH, N), RIGHT)
    words[0] = 5  # one word again and again
    with torch.no_grad():
        right = model(words, attention_mask=RIGHT).logits[RIGHT]
        got = model.to(dtype)(words, attention_mask=RIGHT).logits
    assert got.dtype == dtype
    assert got.isfinite().all()
    error = (got[RIGHT].float() - right).abs().max() / right.abs().max()
    assert error < 16 * torch.finfo(dtype).eps
    with torch.no_grad():
        for weights in model(words, attention_mask=RIGHT, output_attentions=True).attentions:
            assert weights.dtype == dtype
            assert weights.isfinite().all()


@HALF
@pytest.mark.parametrize("way", ["sampled", "planes"])
def test_sampling_in_half_precision_is_near_float32(way: str, dtype: torch.dtype) -> None:
    """Rounded vectors change a few codes, so single contexts may differ; most agree."""
    model = lively("YosoModel", **WAYS[way], num_hash=32).to(dtype).float()
    attention = model.encoder.layer[0].attention.self
    words = ids(BATCH, N)
    with torch.no_grad():
        hidden = model.embeddings(words).to(dtype)
        right = attention(hidden.float(), RIGHT)[0].unflatten(-1, (3, 12))[RIGHT]
        model.to(dtype)
        got = attention(hidden, RIGHT)[0].unflatten(-1, (3, 12))[RIGHT]
        whole = model(words, attention_mask=RIGHT).last_hidden_state
    assert got.dtype == whole.dtype == dtype
    assert whole.isfinite().all()
    similar = F.cosine_similarity(got.float(), right, dim=-1)
    assert similar.mean() > 1 - 8 * torch.finfo(dtype).eps


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 300.0, 1e-4], ids=["plain", "large", "small"])
def test_zero_rows_and_repeated_rows_are_harmless(size: float, dtype: torch.dtype, way: str) -> None:
    """Queries of 300 have squares beyond float16, those of 1e-4 have squares that vanish there; a
    zero query has no direction.

    Their lengths are taken in float32, so the context does not depend on the size of queries and
    keys.
    """
    model = lively("YosoModel", **WAYS[way])
    attention = model.encoder.layer[0].attention.self.to(dtype)
    hidden = torch.randn(2, 8, 36, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden[0, 2] = 0
    hidden[1, 3:] = hidden[1, 2]
    with torch.no_grad():
        attention.query.bias.zero_()
        attention.key.bias.zero_()
        right = attention(hidden)[0]
        attention.query.weight.mul_(size)
        attention.key.weight.mul_(size)
        got = attention(hidden)[0]
    assert got.isfinite().all()
    assert got[0, 2].any() or way != "expectation"  # at a right angle to all, so it takes something from each
    for i in range(4, 8):
        torch.testing.assert_close(got[1, i], got[1, 3], rtol=0, atol=0)
    if way == "expectation":
        close(got, right, 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5)
    else:
        same = torch.isclose(got.float(), right.float(), rtol=0, atol=8 * torch.finfo(dtype).eps).unflatten(-1, (3, 12)).all(-1)
        assert same.double().mean() >= (1 if size == 1 or dtype == torch.float32 else 0.9)  # a rounded vector may have another code


def of_one_word() -> Tensor:
    return torch.full((1, 12), 5)


@every_way
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_repeated_words_at_one_position_have_no_nan(training: bool, way: str) -> None:
    """Every token is the same vector, and with equal projections every query is its key."""
    model = lively("YosoForMaskedLM", **WAYS[way], **NO_DROPOUT).train(training)
    with torch.no_grad():
        for layer in model.yoso.encoder.layer:
            attention = layer.attention.self
            attention.key.weight.copy_(attention.query.weight)
            attention.key.bias.copy_(attention.query.bias)
    output = model(of_one_word(), position_ids=torch.full((1, 12), 2), labels=of_one_word(), output_hidden_states=True)
    assert output.logits.isfinite().all()
    close(output.logits, output.logits[:, :1].expand_as(output.logits), 1e-6)
    output.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


# What transformers does in the same places


def test_transformers_has_no_padding() -> None:
    """Its mask changes nothing at all, so a padded row is another row; ours is theirs cut to its
    tokens.
    """
    model = lively("YosoForMaskedLM")
    theirs = stock(model)
    words = padded(ids(BATCH, N), RIGHT)
    with torch.no_grad():
        got = model(words, attention_mask=RIGHT.long()).logits
        masked = theirs(words, attention_mask=RIGHT.long()).logits
        torch.testing.assert_close(masked, theirs(words).logits, rtol=0, atol=0)
        for i, n in enumerate(LENGTHS):
            cut = theirs(words[i : i + 1, :n]).logits[0]
            close(got[i, :n], cut)
            assert ((masked[i, :n] - cut).abs().max() > 0.1) == (n < N)


def test_transformers_has_nan_where_a_query_is_its_key() -> None:
    """The inner product of a unit vector with itself may round to more than 1, where arccos is not
    defined.
    """
    model = lively("YosoModel")
    with torch.no_grad():
        for layer in model.encoder.layer:
            attention = layer.attention.self
            attention.key.weight.copy_(attention.query.weight)
            attention.key.bias.copy_(attention.query.bias)
        words = ids(BATCH, N)
        assert model(words).last_hidden_state.isfinite().all()
        assert stock(model)(words).last_hidden_state.isnan().any()


@pytest.mark.parametrize("way", ["sampled", "planes"])
def test_transformers_cannot_sample_on_a_cpu(way: str) -> None:
    model = lively("YosoModel", **WAYS[way])
    assert model(ids(1, 4)).last_hidden_state.isfinite().all()
    with pytest.raises(AttributeError, match="NoneType"):
        stock(model)(ids(1, 4))


def test_transformers_gives_the_context_for_the_attentions() -> None:
    model = lively("YosoModel")
    words = ids(BATCH, N)
    seen: list[Tensor] = []
    for layer in model.encoder.layer:
        layer.attention.self.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    with torch.no_grad():
        ours = model(words, output_attentions=True).attentions
        theirs = stock(model)(words, output_attentions=True).attentions
    for weights, context, given in zip(ours, seen, theirs, strict=True):
        assert weights.shape == (BATCH, 3, N, N)
        close(given, context)
