"""Every head beside transformers' with the same weights: outputs, losses and gradients, where
transformers is right.
"""

import math
from typing import Any

import pytest
import torch
from model_support import WAYS, close, gradients, ids, lively, stock
from torch import Tensor, nn
from torch.nn import functional as F

import yoso_core
from yoso_core.model import YosoForMaskedLM, YosoModel, expected_weights, yoso_attention
from yoso_core.model.draws import evaluation_planes, evaluation_signs

BATCH, N, CHOICES = 3, 13, 2


def some_ignored(labels: Tensor) -> Tensor:
    labels = labels.clone()
    labels[:, ::3] = -100
    return labels


HEADS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "base": ("YosoModel", {}, {}),
    "masked_lm": ("YosoForMaskedLM", {}, {"labels": some_ignored(ids(BATCH, N, seed=1))}),
    "single_label": ("YosoForSequenceClassification", {"num_labels": 4}, {"labels": torch.tensor([3, 0, 1])}),
    "multi_label": (
        "YosoForSequenceClassification",
        {"num_labels": 4},
        {"labels": torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]])},
    ),
    "regression": ("YosoForSequenceClassification", {"num_labels": 1}, {"labels": torch.tensor([0.5, -2.0, 1.0])}),
    "regression_of_three": (
        "YosoForSequenceClassification",
        {"num_labels": 3, "problem_type": "regression"},
        {"labels": torch.tensor([[0.5, -2.0, 1.0], [3.0, 0.1, 0.0], [0.0, 0.0, -1.0]])},
    ),
    "multiple_choice": ("YosoForMultipleChoice", {}, {"labels": torch.tensor([1, 0, 1])}),
    "token_classification": ("YosoForTokenClassification", {"num_labels": 5}, {"labels": some_ignored(ids(BATCH, N, seed=1) % 5)}),
    "question_answering": (
        "YosoForQuestionAnswering",
        {},
        {"start_positions": torch.tensor([2, 0, N + 4]), "end_positions": torch.tensor([5, 12, N])},
    ),
}
"""Class, settings, and labels, of which some do not count."""

every_head = pytest.mark.parametrize("head", HEADS)


def build(head: str, **changes: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A model, its inputs and its labels."""
    name, settings, labels = HEADS[head]
    model = lively(name, **settings, **changes)
    shape = (BATCH, CHOICES, N) if name == "YosoForMultipleChoice" else (BATCH, N)
    inputs = {"input_ids": ids(*shape)}
    if model.config.type_vocab_size == 2:
        inputs["token_type_ids"] = (torch.arange(N) > 6).long().expand(shape)
    return model, inputs, labels


# Beside transformers


@every_head
@pytest.mark.parametrize("type_vocab_size", [1, 2], ids="types{}".format)
@pytest.mark.parametrize("conv_window", [None, 5], ids="conv{}".format)
def test_outputs_losses_and_gradients_are_those_of_transformers(head: str, conv_window: int | None, type_vocab_size: int) -> None:
    model, inputs, labels = build(head, conv_window=conv_window, type_vocab_size=type_vocab_size)
    theirs = stock(model)
    got, expected = (m(**inputs, **labels, output_hidden_states=True) for m in (model, theirs))
    assert list(got) == list(expected)
    assert ("loss" in got) == bool(labels)
    for name in got:
        if name == "hidden_states":
            assert len(got.hidden_states) == len(expected.hidden_states) == 3
            for x, y in zip(got.hidden_states, expected.hidden_states, strict=True):
                close(x, y)
        else:
            close(got[name], expected[name])
    for output in (got, expected):
        (output.loss if labels else output.last_hidden_state.square().sum()).backward()
    grads, right = gradients(model), gradients(theirs)
    assert grads.keys() == right.keys()
    for name, grad in grads.items():
        close(grad, right[name])
    assert grads[next(name for name in grads if name.endswith("layer.0.attention.self.query.weight"))].any()


@every_head
@pytest.mark.parametrize("asked", [False, True], ids=["outputs", "outputs_and_hidden_states"])
@pytest.mark.parametrize("labeled", [False, True], ids=["unlabeled", "labeled"])
def test_tuples_hold_what_dicts_hold_in_the_order_of_transformers(head: str, labeled: bool, asked: bool) -> None:
    model, inputs, labels = build(head)
    inputs = inputs | labels if labeled else inputs
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=asked)
        found = model(**inputs, output_hidden_states=asked, return_dict=False)
        expected = stock(model)(**inputs, output_hidden_states=asked, return_dict=False)
        model.config.return_dict = False
        by_config = model(**inputs, output_hidden_states=asked)
    assert isinstance(found, tuple)
    assert isinstance(by_config, tuple)
    assert len(found) == len(expected) == len(by_config) == len(whole)
    for got, right, again, same in zip(found, expected, by_config, whole.values(), strict=True):
        for x, y, z, w in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, right, again, same)), strict=True):
            close(x, y)
            torch.testing.assert_close(z, x, rtol=0, atol=0)
            torch.testing.assert_close(w, x, rtol=0, atol=0)


def without_values(model: nn.Module) -> None:
    """No attention at all: every value is zero."""
    for name, weight in model.named_parameters():
        if ".self.value." in name:
            weight.zero_()


def without_convolution(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        if name.endswith(".self.conv.weight"):
            weight.zero_()


def without_queries(model: nn.Module) -> None:
    """Every token attends to all others alike."""
    for name, weight in model.named_parameters():
        if ".self.query." in name:
            weight.zero_()


def with_another_code_length(model: Any) -> None:
    model.config.hash_code_len += 1


def with_one_token_more(model: Any) -> None:
    """Positions that begin one row late."""
    table = model.base_model.embeddings.position_embeddings.weight
    table.copy_(table.roll(1, 0))


@every_head
@pytest.mark.parametrize(
    "spoil",
    [without_values, without_convolution, without_queries, with_another_code_length, with_one_token_more],
    ids=lambda function: function.__name__,
)
def test_the_comparison_sees_attention(head: str, spoil: Any) -> None:
    """Its twins: what is taken away shows in every output, far beyond the tolerance."""
    model, inputs, labels = build(head, conv_window=5)
    with torch.no_grad():
        before = model(**inputs, **labels)
        spoil(model)
        after = model(**inputs, **labels)
    for x, y in zip(before.values(), after.values(), strict=True):
        assert (x - y).abs().max() > (1e-4 if x.dim() == 0 else 1e-3)  # a loss is a mean


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_and_labels_may_be_int32(dtype: torch.dtype) -> None:
    model, inputs, labels = build("masked_lm")
    expected = model(**inputs, **labels)
    got = model(inputs["input_ids"].to(dtype), labels=labels["labels"].to(dtype))
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=0)


def test_explicit_positions_and_types_and_embeddings_are_those_of_transformers() -> None:
    model = lively("YosoForMaskedLM", type_vocab_size=2)
    position_ids = torch.stack([torch.randperm(26, generator=torch.Generator().manual_seed(i))[:N] for i in range(BATCH)])
    given = {"token_type_ids": ids(BATCH, N, seed=2) % 2, "position_ids": position_ids}
    words = ids(BATCH, N)
    embeds = model.get_input_embeddings()(words)
    with torch.no_grad():
        expected = stock(model)(words, **given).logits
        close(model(words, **given).logits, expected)
        close(model(inputs_embeds=embeds, **given).logits, expected)
        assert (model(words, token_type_ids=given["token_type_ids"]).logits - expected).abs().max() > 1e-3
        assert (model(words, position_ids=position_ids).logits - expected).abs().max() > 1e-3
        close(model(words).logits, stock(model)(words).logits)
        shared = {"position_ids": position_ids[:1], "token_type_ids": given["token_type_ids"][:1]}
        alike = {name: x.expand(BATCH, N) for name, x in shared.items()}
        torch.testing.assert_close(model(words, **shared).logits, model(words, **alike).logits, rtol=0, atol=0)


def test_the_models_longest_text_is_taken() -> None:
    model = lively("YosoForMaskedLM")
    words = ids(1, 24)
    with torch.no_grad():
        close(model(words).logits, stock(model)(words).logits)


def test_one_token_and_an_empty_batch() -> None:
    model = lively("YosoForMaskedLM", conv_window=5)
    with torch.no_grad():
        close(model(ids(2, 1)).logits, stock(model)(ids(2, 1)).logits)
        assert model(ids(0, 4)).logits.shape == (0, 4, 61)


@pytest.mark.parametrize("way", WAYS)
def test_the_feed_forward_network_in_chunks_gives_the_same(way: str) -> None:
    model = lively("YosoModel", **WAYS[way])
    with torch.no_grad():
        expected = model(ids(2, 12)).last_hidden_state
        model.config.chunk_size_feed_forward = 4
        sizes = []
        model.encoder.layer[0].intermediate.register_forward_hook(lambda module, given, out: sizes.append(out.shape[1]))
        close(model(ids(2, 12)).last_hidden_state, expected)
    assert sizes == [4, 4, 4]


@every_head
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_hidden_states_can_be_kept(head: str, way: str) -> None:
    model, inputs, _ = build(head, **WAYS[way])
    output = model(**inputs, output_hidden_states=True)
    for states in output.hidden_states:
        states.retain_grad()
    output[0].flatten()[0].backward()
    for states in output.hidden_states[:-1]:
        assert states.grad.isfinite().all()
        assert states.grad.any()
    if head != "base":  # whose last hidden state is its output
        assert output.hidden_states[-1].grad.any()


def test_kept_gradients_of_hidden_states_are_those_of_transformers() -> None:
    model, inputs, labels = build("masked_lm", conv_window=3)
    found = []
    for m in (model, stock(model)):
        output = m(**inputs, **labels, output_hidden_states=True)
        for states in output.hidden_states:
            states.retain_grad()
        (100 * output.loss).backward()
        found.append([states.grad for states in output.hidden_states])
    for x, y in zip(*found, strict=True):
        close(x, y)


# Losses, by their formulas


def test_a_masked_lm_loss_is_the_mean_over_labels_that_count() -> None:
    model, inputs, labels = build("masked_lm")
    with torch.no_grad():
        output = model(**inputs, **labels)
        by_hand = [
            -output.logits[i, j].log_softmax(-1)[word]
            for i, row in enumerate(labels["labels"].tolist())
            for j, word in enumerate(row)
            if word != -100
        ]
        close(output.loss, torch.stack(by_hand).mean())
        of_more = model(**inputs, **labels, num_items_in_batch=torch.tensor(1000))
    close(of_more.loss, torch.stack(by_hand).sum() / 1000)


def test_labels_at_padding_do_not_count_in_token_classification() -> None:
    model, inputs, labels = build("token_classification")
    attention_mask = (torch.arange(N) < torch.tensor([N, 7, 4])[:, None]).long()
    hidden = labels["labels"].masked_fill(attention_mask == 0, -100)
    with torch.no_grad():
        loss = model(**inputs, attention_mask=attention_mask, **labels).loss
        close(loss, model(**inputs, attention_mask=attention_mask, labels=hidden).loss)
        assert abs(loss - model(**inputs, **labels).loss) > 1e-3


def test_labels_of_one_column_are_taken_as_a_row() -> None:
    for head in ("single_label", "regression", "question_answering"):
        model, inputs, labels = build(head)
        with torch.no_grad():
            expected = model(**inputs, **labels).loss
            close(model(**inputs, **{name: x[:, None] for name, x in labels.items()}).loss, expected)


def test_the_problem_follows_from_the_labels_each_time() -> None:
    """A model that was asked for one kind of loss can be asked for another; the config stays as it
    was.
    """
    model, inputs, labels = build("single_label")
    several = HEADS["multi_label"][2]
    with torch.no_grad():
        logits = model(**inputs).logits
        for _ in range(2):
            close(model(**inputs, **labels).loss, F.cross_entropy(logits, labels["labels"]))
            close(model(**inputs, **several).loss, F.binary_cross_entropy_with_logits(logits, several["labels"]))
    assert model.config.problem_type is None


def test_losses_of_float64_are_float64() -> None:
    model, inputs, labels = build("masked_lm")
    output = model.double()(**inputs, **labels)
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels["labels"].flatten())
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", ["masked_lm", "single_label", "multiple_choice", "token_classification", "question_answering"])
def test_cross_entropies_of_half_precision_are_float32(head: str) -> None:
    """The scores are rounded, the sum over them is not."""
    model, inputs, labels = build(head)
    output = model.bfloat16()(**inputs, **labels)
    assert output[1].dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    model.float()
    expected = model(**inputs, **labels).loss
    assert abs(float(output.loss.detach() - expected.detach())) < 0.1


# Pre-training: masked words and the order of sentences


def test_pre_training_predicts_what_a_masked_lm_predicts_and_the_order() -> None:
    model = lively("YosoForPreTraining", conv_window=3)
    words, order = ids(BATCH, N), torch.tensor([1, 0, 1])
    labels = some_ignored(ids(BATCH, N, seed=1))
    masked_lm = YosoForMaskedLM(model.config).eval()
    rest = masked_lm.load_state_dict(model.state_dict(), strict=False)
    assert not rest.missing_keys
    assert {key.partition(".")[0] for key in rest.unexpected_keys} == {"sop_classifier"}
    with torch.no_grad():
        found = model(words, labels=labels, sentence_order_label=order, output_hidden_states=True)
        expected = stock(masked_lm)(words, labels=labels)
        close(found.prediction_logits, expected.logits)
        head, first = model.sop_classifier, found.hidden_states[-1][:, 0]
        by_hand = torch.tanh(first @ head.dense.weight.T + head.dense.bias) @ head.out_proj.weight.T + head.out_proj.bias
        close(found.sop_logits, by_hand)
        order_loss = -by_hand.log_softmax(-1)[torch.arange(BATCH), order].mean()
        close(found.loss, expected.loss + order_loss)
        close(model(words, labels=labels).loss, expected.loss)
        close(model(words, sentence_order_label=order).loss, order_loss)
        assert model(words).loss is None
        as_tuple = model(words, labels=labels, sentence_order_label=order, return_dict=False)
    assert [x.shape for x in as_tuple] == [(), (BATCH, N, 61), (BATCH, 2)]


def test_pre_training_reaches_every_weight_and_ties_its_words() -> None:
    model = lively("YosoForPreTraining")
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    model(ids(BATCH, N), labels=ids(BATCH, N, seed=1), sentence_order_label=torch.tensor([1, 0, 1])).loss.backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


# Attentions


def contexts(model: YosoModel, **inputs: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """The input and the context of every layer's attention, and the output."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.attention.self.register_forward_hook(lambda module, given, out: seen.append((given[0], out[0])))
        for layer in model.encoder.layer
    ]
    with torch.no_grad():
        output = model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen, output


def split(x: Tensor, heads: int = 3) -> Tensor:
    """``(batch, n, heads * d)`` to ``(batch, heads, n, d)``."""
    batch, n, _ = x.shape
    return x.reshape(batch, n, heads, -1).transpose(1, 2)


def collisions(query: Tensor, key: Tensor, model: YosoModel, layer: int, way: str) -> Tensor:
    """The share of hashes in which a query and a key have the same code."""
    drawn = draw(way, model, layer)
    hashed = [
        torch.from_numpy(yoso_core.fast_hash(x.numpy(), drawn["signs"].numpy(), 8, 4))
        if way == "sampled"
        else ((x @ drawn["planes"] > 0).unflatten(-1, (8, 4)) * 2 ** torch.arange(4)).sum(-1)
        for x in (query, key)
    ]
    return (hashed[0][:, :, :, None] == hashed[1][:, :, None]).float().mean(-1)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "padded"])
@pytest.mark.parametrize("conv_window", [None, 5], ids="conv{}".format)
@pytest.mark.parametrize("way", WAYS)
def test_attentions_are_the_weights_of_the_context(way: str, conv_window: int | None, masked: bool) -> None:
    """``E_ij = (1 - theta_ij / pi)**tau``, or the share of collisions; rows of them times the
    values, scaled to unit length, are the context.
    """
    model = lively("YosoModel", conv_window=conv_window, **WAYS[way])
    keep = torch.arange(N) < torch.tensor([N, 8, 1])[:, None] if masked else torch.ones(BATCH, N, dtype=torch.bool)
    mask = {"attention_mask": keep.long()} if masked else {}
    seen, output = contexts(model, input_ids=ids(BATCH, N), output_attentions=True, **mask)
    assert len(output.attentions) == 2
    for i, (layer, (hidden, context), weights) in enumerate(zip(model.encoder.layer, seen, output.attentions, strict=True)):
        assert weights.shape == (BATCH, 3, N, N)
        attention = layer.attention.self
        query, key, value = (split(x(hidden).detach()) for x in (attention.query, attention.key, attention.value))
        cosine = (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT).clamp(-1, 1)
        pairs = (keep[:, :, None] & keep[:, None, :])[:, None]
        used = (1 - torch.acos(cosine) / math.pi) ** 4 if way == "expectation" else collisions(query, key, model, i, way)
        close(weights, used * pairs)
        rows = F.normalize(weights @ value, dim=-1)
        if conv_window is not None:
            shown = F.pad((value * keep[:, None, :, None]), (0, 0, 2, 2))
            kernel = attention.conv.weight.detach()  # (heads, 1, window, 1)
            rows = rows + sum(kernel[:, :, i] * shown[:, :, i : i + N] for i in range(conv_window))
        close(context, rows.transpose(1, 2).flatten(2))
        spread = (weights.amax(-1) - weights.mean(-1))[:, :, 0]  # they say something; a sampled query may meet no key
        assert (spread.min() if way == "expectation" else spread.max()) > 0.01 or masked


def test_attentions_do_not_change_the_output() -> None:
    model, inputs, labels = build("masked_lm")
    with torch.no_grad():
        plain = model(**inputs, **labels)
        shown = model(**inputs, **labels, output_attentions=True)
        model.config.output_attentions = True
        by_config = model(**inputs, **labels)
    torch.testing.assert_close(shown.logits, plain.logits, rtol=0, atol=0)
    assert plain.attentions is None
    for x, y in zip(shown.attentions, by_config.attentions, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def reference_weights(query: Tensor, key: Tensor, tau: int) -> Tensor:
    """In float64, by arctangent: from two vectors of one length, half the angle is that between
    their sum and their difference.
    """
    q, k = (F.normalize(x.double(), dim=-1) for x in (query, key))
    apart, along = (q[..., :, None, :] - k[..., None, :, :]).norm(dim=-1), (q[..., :, None, :] + k[..., None, :, :]).norm(dim=-1)
    return (1 - 2 * torch.atan2(apart, along) / math.pi) ** tau


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [1, 9, 30], ids="tau{}".format)
def test_expected_weights_are_the_formula(tau: int, dtype: torch.dtype) -> None:
    """Equal vectors weigh 1, opposite ones nothing, and a zero vector is at a right angle to all;
    whatever their lengths.
    """
    query = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    key = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    key[0, 0], key[0, 1], key[0, 2] = query[0, 0], -query[0, 1], 0
    got = expected_weights(query, key, tau)
    assert got.dtype == dtype
    expected = reference_weights(query, key, tau)
    expected[0, :, 2] = 0.5**tau
    close(got.double(), expected, max(torch.finfo(dtype).eps, 1e-12 if dtype == torch.float64 else 1e-5))
    assert abs(float(got[0, 0, 0]) - 1) < 1e-5
    assert float(got[0, 1, 1]) < 1e-5
    for size in (2.0**-10, 2.0**10) if dtype == torch.float16 else (2.0**-100, 2.0**100):
        close(expected_weights(query * size, key * size, tau), got, torch.finfo(dtype).eps if dtype != torch.float16 else 1e-2)


def test_expected_weights_leave_out_what_is_masked() -> None:
    query, key = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    whole = expected_weights(query, key, 4)
    keep_query, keep_key = torch.tensor([[1, 1, 0, 1, 1]])[:, None], torch.tensor([[0, 1, 1, 1, 0], [1] * 5])[:, None]
    query[:, :, 2], key[0, :, 0], key[0, :, 4] = torch.nan, torch.inf, torch.nan
    got = expected_weights(query, key, 4, query_mask=keep_query, key_mask=keep_key)
    torch.testing.assert_close(got, whole * keep_query[..., None] * keep_key[..., None, :], rtol=0, atol=0)


def test_expected_weights_have_the_true_derivative() -> None:
    query, key = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64).requires_grad_() for n in (3, 4))
    assert torch.autograd.gradcheck(lambda *x: expected_weights(*x, 3), (query, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_expected_weights_are_finite_where_there_is_none(dtype: torch.dtype) -> None:
    """Of equal, opposite, zero and masked vectors; a zero vector has no direction to turn, so its
    gradient is zero.
    """
    query = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    key = torch.stack([query[0], -query[1], torch.zeros(6, dtype=dtype), torch.full((6,), torch.nan, dtype=dtype), query[3] + 1])
    query.requires_grad_()
    key.requires_grad_()
    expected_weights(query, key, 4, key_mask=torch.tensor([1, 1, 1, 0, 1])).sum().backward()
    assert query.grad.isfinite().all()
    assert key.grad.isfinite().all()
    assert not key.grad[2:4].any()
    assert key.grad[4].any()


@every_head
def test_every_head_gives_attentions(head: str) -> None:
    model, inputs, _ = build(head)
    rows = BATCH * (CHOICES if head == "multiple_choice" else 1)
    assert [x.shape for x in model(**inputs, output_attentions=True).attentions] == [(rows, 3, N, N)] * 2


# What the settings mean, layer by layer


def draw(way: str, model: YosoModel, layer: int) -> dict[str, Tensor]:
    settings = model.config
    shape = settings.hash_seed, layer, 3, settings.num_hash, settings.hash_code_len, 12
    if way == "expectation":
        return {}
    return {"signs": evaluation_signs(*shape)} if way == "sampled" else {"planes": evaluation_planes(*shape)}


@pytest.mark.parametrize("grad", ["lower_bound", "exact"])
@pytest.mark.parametrize("lsh_backward", [True, False], ids=["lsh", "dense"])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_attends_as_its_config_says(way: str, lsh_backward: bool, grad: Any) -> None:
    """Context and gradients are those of `yoso_attention` with the settings and the draw of layer
    and heads; padded, with a convolution.
    """
    model = lively("YosoModel", conv_window=3, lsh_backward=lsh_backward, grad=grad, hash_seed=5, **WAYS[way])
    keep = torch.arange(N) < torch.tensor([N, 8, 1])[:, None]
    for layer in (0, 1):
        attention = model.encoder.layer[layer].attention.self
        hidden = torch.randn(BATCH, N, 36, generator=torch.Generator().manual_seed(layer), requires_grad=True)
        grad_out = torch.randn(BATCH, N, 36, generator=torch.Generator().manual_seed(9))
        context, weights = attention(hidden, keep)
        assert weights is None
        query, key, value = (split(x(hidden)) for x in (attention.query, attention.key, attention.value))
        expected = yoso_attention(
            query,
            key,
            value,
            num_hash=8,
            hash_code_len=4,
            use_expectation=way == "expectation",
            **draw(way, model, layer),
            query_mask=keep[:, None],
            key_mask=keep[:, None],
            grad=grad,
            backward="lsh" if lsh_backward else "expectation",
        )
        shown = F.pad(value * keep[:, None, :, None], (0, 0, 1, 1))
        expected = expected + sum(attention.conv.weight[:, :, i] * shown[:, :, i : i + N] for i in range(3))
        expected = expected.transpose(1, 2).flatten(2)
        close(context, expected)
        wanted = [hidden, *attention.parameters()]
        for x, y in zip(torch.autograd.grad(context, wanted, grad_out), torch.autograd.grad(expected, wanted, grad_out), strict=True):
            close(x, y)


def first_gradient(**changes: Any) -> Tensor:
    model = lively("YosoForMaskedLM", **changes)
    model(ids(BATCH, N), labels=ids(BATCH, N, seed=1)).loss.backward()
    return model.yoso.encoder.layer[0].attention.self.query.weight.grad


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (WAYS["sampled"], WAYS["planes"]),
        (WAYS["sampled"], WAYS["sampled"] | {"lsh_backward": False}),
        (WAYS["planes"], WAYS["planes"] | {"lsh_backward": False}),
        (WAYS["sampled"], WAYS["sampled"] | {"grad": "exact"}),
        ({}, {"grad": "exact"}),
        (WAYS["sampled"], WAYS["sampled"] | {"num_hash": 9}),
        ({}, {"hash_code_len": 5}),
        (WAYS["sampled"], WAYS["sampled"] | {"hash_seed": 1}),
    ],
    ids=["planes", "dense_backward", "dense_backward_of_planes", "exact", "exact_expectation", "num_hash", "hash_code_len", "hash_seed"],
)
def test_every_setting_has_its_effect_on_gradients(before: dict[str, Any], after: dict[str, Any]) -> None:
    x, y = first_gradient(**before), first_gradient(**after)
    assert (x - y).abs().max() > 0.01 * x.abs().max()


def test_settings_are_read_at_every_call() -> None:
    model, words = lively("YosoModel"), ids(BATCH, N)
    changed = {"use_expectation": False, "num_hash": 13, "hash_code_len": 3, "hash_seed": 4, "use_fast_hash": False}
    with torch.no_grad():
        before = model(words).last_hidden_state
        for name, value in changed.items():
            setattr(model.config, name, value)
        got = model(words).last_hidden_state
        torch.testing.assert_close(got, lively("YosoModel", **changed)(words).last_hidden_state, rtol=0, atol=0)
        model.config.use_expectation, model.config.hash_code_len = True, 4
        torch.testing.assert_close(model(words).last_hidden_state, before, rtol=0, atol=0)
    assert (got - before).abs().max() > 1e-3


def test_many_hashes_come_near_the_expectation() -> None:
    """The error falls as one over the square root of the number of hashes: 64 times as many, an
    eighth.
    """
    model, words = lively("YosoModel", hash_code_len=2), ids(BATCH, N)
    attention = model.encoder.layer[0].attention.self
    with torch.no_grad():
        hidden = model.embeddings(words)
        right = attention(hidden)[0]
        for way in ("sampled", "planes"):
            errors = []
            for num_hash in (16, 1024):
                model.config.update(WAYS[way] | {"use_fast_hash": way == "sampled", "num_hash": num_hash})
                draws = []
                for seed in range(8):
                    model.config.hash_seed = seed
                    draws.append((attention(hidden)[0] - right).square().mean())
                errors.append(float(torch.stack(draws).mean().sqrt()))
            # The fast hash of 16 dims is a little biased; what is left of it is far below half of
            # the first error.
            assert errors[1] < errors[0] / (3 if way == "sampled" else 6)
            model.config.use_expectation = True


def test_the_exact_gradient_is_the_models_derivative() -> None:
    """By differences along one direction, in float64; the lower bound, the paper's, is another."""
    found = {}
    direction = torch.randn(2, 5, 36, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for grad in ("exact", "lower_bound"):
        model = lively("YosoModel", conv_window=3, grad=grad).double()
        embeds = model.get_input_embeddings()(ids(2, 5)).detach().requires_grad_()

        def value(x: Tensor, model: YosoModel = model) -> Tensor:
            return (model(inputs_embeds=x).last_hidden_state * torch.linspace(-1, 1, 36, dtype=torch.float64)).sum()

        (slope,) = torch.autograd.grad(value(embeds), embeds)
        with torch.no_grad():
            by_differences = (value(embeds + 1e-5 * direction) - value(embeds - 1e-5 * direction)) / 2e-5
        found[grad] = float(abs((slope * direction).sum() - by_differences) / abs(by_differences))
    assert found["exact"] < 1e-6
    assert found["lower_bound"] > 1e-3


def test_variants_named_in_the_config_run() -> None:
    words = ids(2, 7)
    expected = {way: lively("YosoModel", **WAYS[way])(words).last_hidden_state for way in ("expectation", "sampled")}
    names = [v.name for v in yoso_core.variants("yoso_attention") if v.available and v.where in ("numpy", "cpu")]
    assert len(names) >= 2
    for name in names:
        for way, right in expected.items():
            close(lively("YosoModel", kernel_variant=name, **WAYS[way])(words).last_hidden_state, right)


def test_a_variant_that_cannot_run_here_says_so() -> None:
    missing = [v for v in yoso_core.variants("yoso_attention") if not v.available]
    if not missing:
        pytest.skip("every variant can run here")
    for variant in missing:
        with pytest.raises(ValueError, match=rf"^variant: {variant.name} of yoso_attention cannot run here"):
            lively("YosoModel", kernel_variant=variant.name, use_expectation=False)(ids(2, 7))
