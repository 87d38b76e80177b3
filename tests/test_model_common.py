"""What transformers asks of every encoder, asked of every head here, in both modes: the questions
of its common model tests and of its tests of configs, in our own words.

Where a question has a test of more detail elsewhere (beside transformers' own YOSO, padding,
files), this one says that no head and no mode was left out.
"""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import TINY, WAYS, close, config, enliven, gradients, ids, lively
from torch import Tensor, nn

from yoso_core import model as ours
from yoso_core.model import YosoConfig

BATCH, N, CHOICES, LABELS = 3, 7, 2, 3
LAYERS, HEADS_OF_A_LAYER, HIDDEN = TINY["num_hidden_layers"], TINY["num_attention_heads"], TINY["hidden_size"]
KEEP = torch.arange(N) < torch.tensor([N, 5, 1])[:, None]
"""True for tokens, with padding on the right."""

ACCELERATE = "accelerate is not installed"

WITH_LABELS: dict[str, dict[str, Tensor]] = {
    "YosoModel": {},
    "YosoForMaskedLM": {"labels": ids(BATCH, N, seed=1)},
    "YosoForPreTraining": {"labels": ids(BATCH, N, seed=1), "sentence_order_label": torch.tensor([0, 1, 1])},
    "YosoForSequenceClassification": {"labels": torch.tensor([2, 0, 1])},
    "YosoForMultipleChoice": {"labels": torch.tensor([1, 0, 1])},
    "YosoForTokenClassification": {"labels": ids(BATCH, N, seed=1) % LABELS},
    "YosoForQuestionAnswering": {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([3, 2, 6])},
}
PREDICT_WORDS = ["YosoForMaskedLM", "YosoForPreTraining"]
HEADS = list(WITH_LABELS)

every_head = pytest.mark.parametrize("head", HEADS)
both_modes = pytest.mark.parametrize("way", ["expectation", "sampled"])


def build(head: str, way: str = "expectation", **changes: Any) -> Any:
    """A model in evaluation mode, whose attention matters."""
    changes = {"num_labels": LABELS, "type_vocab_size": 2} | WAYS[way] | changes
    return lively(head, **changes)


def texts(head: str, **others: Tensor) -> dict[str, Tensor]:
    """A padded batch."""
    inputs = {
        "input_ids": ids(BATCH, N).masked_fill(~KEEP, 1),
        "attention_mask": KEEP.long(),
        "token_type_ids": ids(BATCH, N, seed=2) % 2,
    }
    if head == "YosoForMultipleChoice":
        inputs = {name: x[:, None].repeat(1, CHOICES, 1) for name, x in inputs.items()}
        inputs["input_ids"][:, 1] = ids(BATCH, N, seed=3).masked_fill(~KEEP, 1)
    return inputs | others


def rows(head: str) -> int:
    """Of hidden states and attentions."""
    return BATCH * (CHOICES if head == "YosoForMultipleChoice" else 1)


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    parts = output.values() if hasattr(output, "values") else output
    return [x for part in parts for x in (part if isinstance(part, tuple) else (part,))]


ROUNDING = 1e-6
"""Of the largest number. torch's product with a single column rounds by where in memory the weights
lie, on some processors, so the same weights elsewhere give the same only nearly.
"""


def same(got: Any, expected: Any, tolerance: float = 0) -> None:
    for x, y in zip(tensors(got), tensors(expected), strict=True):
        close(x, y, tolerance)


# Calls


@every_head
def test_the_first_arguments_are_those_of_every_encoder(head: str) -> None:
    names = list(inspect.signature(getattr(ours, head).forward).parameters)
    assert names[1:6] == ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"]
    assert getattr(ours, head).main_input_name == "input_ids"


@every_head
@both_modes
def test_a_call_repeats_bit_for_bit(head: str, way: str) -> None:
    model = build(head, way)
    with torch.no_grad():
        same(model(**texts(head)), model(**texts(head)))
        assert all(x.isfinite().all() for x in tensors(model(**texts(head))))


@every_head
@both_modes
def test_a_call_changes_neither_inputs_nor_weights_nor_config(head: str, way: str) -> None:
    model = build(head, way)
    given, weights, settings = texts(head), copy.deepcopy(model.state_dict()), model.config.to_dict()
    model(**given, **WITH_LABELS[head])
    assert all(torch.equal(x, given[name]) for name, x in texts(head).items())
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert model.config.to_dict() == settings


@every_head
@both_modes
def test_a_tuple_holds_what_the_dict_holds(head: str, way: str) -> None:
    model = build(head, way)
    for labels in ({}, WITH_LABELS[head]):
        for asked in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
            with torch.no_grad():
                by_name = model(**texts(head), **labels, **asked)
                by_place = model(**texts(head), **labels, **asked, return_dict=False)
            assert isinstance(by_place, tuple)
            assert len(by_place) == len(by_name)
            same(by_place, by_name)


@every_head
@both_modes
@pytest.mark.parametrize("asked", ["argument", "config"])
def test_hidden_states_are_those_of_all_layers(head: str, way: str, asked: str) -> None:
    model = build(head, way)
    if asked == "config":
        model.config.output_hidden_states = True
    with torch.no_grad():
        output = model(**texts(head), **({"output_hidden_states": True} if asked == "argument" else {}))
    assert output.attentions is None
    assert len(output.hidden_states) == LAYERS + 1
    assert all(x.shape == (rows(head), N, HIDDEN) for x in output.hidden_states)
    if head == "YosoModel":
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@every_head
@both_modes
@pytest.mark.parametrize("asked", ["argument", "config"])
def test_attentions_are_those_of_all_layers(head: str, way: str, asked: str) -> None:
    """They stand last. They are shares, of which padding has none."""
    model = build(head, way)
    if asked == "config":
        model.config.output_attentions = True
    with torch.no_grad():
        output = model(**texts(head), **({"output_attentions": True} if asked == "argument" else {}))
        both = model(**texts(head), output_attentions=True, output_hidden_states=True, return_dict=False)
    assert output.hidden_states is None
    assert len(output.attentions) == LAYERS
    keep = KEEP.repeat_interleave(rows(head) // BATCH, 0)
    for weights in output.attentions:
        assert weights.shape == (rows(head), HEADS_OF_A_LAYER, N, N)
        assert (weights >= 0).all()
        assert (weights <= 1 + 1e-6).all()
        assert weights.any()
        assert not weights.mT[~keep[:, None].expand(-1, HEADS_OF_A_LAYER, -1)].any()
    same(both[-1], output.attentions)
    assert len(both[-2]) == LAYERS + 1


@every_head
@both_modes
def test_gradients_of_hidden_states_and_attentions_can_be_kept(head: str, way: str) -> None:
    model = build(head, way)
    output = model(**texts(head), output_hidden_states=True, output_attentions=True)
    on_the_way = [*output.hidden_states[: None if head != "YosoModel" else -1], *output.attentions]  # to the first output
    for x in on_the_way:
        x.retain_grad()
    output[0].flatten()[0].backward()
    for x in on_the_way:
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.any()


@every_head
@both_modes
def test_embeddings_may_come_in_the_place_of_ids(head: str, way: str) -> None:
    """With the same numbers everywhere, padding as well."""
    model = build(head, way)
    given = texts(head)
    asked = {"output_hidden_states": True}
    with torch.no_grad():
        expected = model(**given, **asked)
        embedded = model.get_input_embeddings()(given.pop("input_ids"))
        same(model(inputs_embeds=embedded, **given, **asked), expected)


@every_head
@both_modes
def test_the_network_in_chunks_gives_the_same(head: str, way: str) -> None:
    model = build(head, way).double()
    with torch.no_grad():
        expected = model(**texts(head))
        model.config.chunk_size_feed_forward = 1
        same(model(**texts(head)), expected, 1e-12)


@every_head
@both_modes
def test_a_text_alone_is_what_it_is_in_a_batch(head: str, way: str) -> None:
    model = build(head, way).double()
    with torch.no_grad():
        together = model(**texts(head))
        for i in range(BATCH):
            alone = model(**{name: x[i : i + 1] for name, x in texts(head).items()})
            for x, y in zip(tensors(alone), tensors(together), strict=True):
                close(x[0], y[i], 1e-12)


@both_modes
@pytest.mark.parametrize("head", ["YosoModel", "YosoForMaskedLM", "YosoForTokenClassification", "YosoForQuestionAnswering"])
def test_padding_on_the_left_gives_the_same(head: str, way: str) -> None:
    model = build(head, way).double()
    positions = (KEEP.flip(1).cumsum(1) + 1).clamp_min(2)
    lengths = KEEP.sum(1).tolist()

    def to_the_left(x: Tensor) -> Tensor:
        return torch.stack([row.roll(N - n) for row, n in zip(x, lengths, strict=True)])

    with torch.no_grad():
        right = model(**texts(head))
        left = model(**{name: to_the_left(x) for name, x in texts(head).items()}, position_ids=positions)
    for x, y in zip(tensors(left), tensors(right), strict=True):
        for i, n in enumerate(lengths):
            close(x[i, N - n :], y[i, :n], 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # checks of shapes are no part of the trace
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # torch looks at every property
@every_head
@both_modes
def test_a_traced_model_is_the_model_at_other_shapes(head: str, way: str) -> None:
    model = build(head, way, return_dict=False)
    names = ("input_ids", "attention_mask")
    traced = torch.jit.trace(model, tuple(texts(head)[name] for name in names))
    others = {name: texts(head)[name].flip(0)[:2, ..., :5] for name in names}
    same(traced(*others.values()), model(**others))


# Learning


@every_head
@both_modes
def test_a_step_of_training_reaches_every_weight(head: str, way: str) -> None:
    model = build(head, way, conv_window=3).train()
    torch.manual_seed(0)
    output = model(**texts(head), **WITH_LABELS[head])
    loss = output.loss if WITH_LABELS[head] else output.last_hidden_state[KEEP].square().sum()
    assert loss.dim() == 0
    loss.backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(grad.isfinite().all() for grad in found.values())
    # One number more for every choice changes no softmax over the choices.
    nothing = "classifier.bias" if head == "YosoForMultipleChoice" else None
    assert all(grad.any() for name, grad in found.items() if name != nothing)


@every_head
@both_modes
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["without_reentrance", "reentrant"])
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_a_step_with_gradient_checkpointing_is_the_same(head: str, way: str, use_reentrant: bool) -> None:
    model = build(head, way).double().train()
    assert model.supports_gradient_checkpointing
    assert not model.is_gradient_checkpointing

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        output = model(**texts(head), **WITH_LABELS[head])
        (output.loss if WITH_LABELS[head] else output.last_hidden_state[KEEP].square().sum()).backward()
        return gradients(model)

    right = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.base_model.encoder.layer)
    again = step()
    assert again.keys() == right.keys()
    for name, grad in right.items():
        close(again[name], grad, 1e-12)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@both_modes
@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("by_config", [False, True], ids=["by_labels", "by_config"])
def test_every_problem_type_has_its_loss(problem: str, way: str, by_config: bool) -> None:
    count = 1 if problem == "regression" else LABELS
    labels = torch.tensor([2, 0, 1])
    if problem != "single_label_classification":
        labels = labels.float() if count == 1 else nn.functional.one_hot(labels, LABELS).float()
    changes = {"num_labels": count} | ({"problem_type": problem} if by_config else {})
    model = build("YosoForSequenceClassification", way, **changes).train()
    output = model(**texts("YosoForSequenceClassification"), labels=labels)
    assert output.logits.shape == (BATCH, count)
    output.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@every_head
@both_modes
def test_gradients_reach_the_inputs(head: str, way: str) -> None:
    """As adapters under checkpointing ask for."""
    model = build(head, way).requires_grad_(False)
    model.enable_input_require_grads()
    output = model(**texts(head))
    assert output[0].requires_grad
    model.disable_input_require_grads()
    assert not model(**texts(head))[0].requires_grad


# Words


@every_head
def test_embeddings_can_be_exchanged(head: str) -> None:
    model = build(head)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    new = nn.Embedding(TINY["vocab_size"], HIDDEN)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new is model.base_model.embeddings.word_embeddings
    assert isinstance(model.get_output_embeddings(), nn.Linear if head in PREDICT_WORDS else type(None))
    assert model(**texts(head))[0].isfinite().all()


@every_head
@both_modes
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_vocabulary_can_be_resized(head: str, way: str, tied: bool) -> None:
    """Longer, shorter, to a multiple; old words keep their rows and the model runs and learns."""
    model = build(head, way, tie_word_embeddings=tied)
    size, given = TINY["vocab_size"], texts(head)
    before = model.get_input_embeddings().weight.detach().clone()
    for new, multiple, expected in ((size + 10, None, size + 10), (size - 15, None, size - 15), (50, 64, 64)):
        table = model.resize_token_embeddings(new, pad_to_multiple_of=multiple, mean_resizing=False)
        assert table is model.get_input_embeddings()
        assert model.config.vocab_size == table.weight.shape[0] == expected
        kept = min(size - 15, expected)
        torch.testing.assert_close(table.weight[:kept], before[:kept], rtol=0, atol=0)
        if head in PREDICT_WORDS:
            decoder = model.get_output_embeddings()
            assert decoder.weight.shape == (expected, HIDDEN)
            assert decoder.bias.shape == (expected,)
            assert (decoder.weight is table.weight) == tied
        given["input_ids"] = given["input_ids"].clamp_max(expected - 1)
        output = model(**given)
        assert output[0].isfinite().all()
        output[0].sum().backward()
        assert table.weight.grad.shape == table.weight.shape
        model.zero_grad()
        del output  # its graph knows the old size
    with pytest.raises(ValueError, match=r"^input_ids: need ids in \[0, 64\)"):
        model(**given | {"input_ids": given["input_ids"].clamp_min(64)})


@pytest.mark.parametrize("head", PREDICT_WORDS)
def test_tied_weights_are_one_and_say_so(head: str) -> None:
    model = build(head)
    decoder = model.get_output_embeddings()
    assert decoder.weight is model.get_input_embeddings().weight
    assert decoder.bias is model.cls.predictions.bias
    assert set(model.all_tied_weights_keys) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert not set(model.all_tied_weights_keys) & dict(model.named_parameters()).keys()
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# Files


@every_head
@both_modes
def test_a_model_goes_through_a_folder(head: str, way: str, tmp_path: Path) -> None:
    model = build(head, way)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again, report = getattr(ours, head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.to_dict() == model.config.to_dict() | {"architectures": [head], "dtype": "float32"} | {
        name: again.config.to_dict()[name] for name in ("_name_or_path",) if name in again.config.to_dict()
    }
    with torch.no_grad():
        same(again(**texts(head)), model(**texts(head)), ROUNDING)


@every_head
@both_modes
def test_a_model_goes_through_torch(head: str, way: str, tmp_path: Path) -> None:
    """Its weights, and the object itself."""
    model = build(head, way)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = build(head, way)
    enliven(again, seed=1)
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    with torch.no_grad():
        expected = model(**texts(head))
        same(again(**texts(head)), expected)
        same(pickle.loads(pickle.dumps(model))(**texts(head)), expected)
        same(copy.deepcopy(model)(**texts(head)), expected)


@every_head
def test_what_a_checkpoint_lacks_is_drawn_as_in_a_new_model(head: str, tmp_path: Path) -> None:
    """Nothing of it is left as memory happened to be, although loading builds the model without
    values.
    """
    settings = config(num_labels=LABELS, conv_window=3, initializer_range=0.02)
    settings.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    torch.manual_seed(0)
    fresh = getattr(ours, head)(settings)
    torch.manual_seed(0)
    loaded = getattr(ours, head).from_pretrained(tmp_path)
    for (name, x), y in zip(fresh.named_parameters(), loaded.parameters(), strict=True):
        assert not y.is_meta
        close(y.mean(), x.mean(), 0.02)
        close(y.std(correction=0), x.std(correction=0), 0.02)
        assert y.any() == x.any(), name


@every_head
def test_new_weights_follow_the_configs_range(head: str) -> None:
    """Means that are 0 or 1 where nothing else is drawn."""
    model = getattr(ours, head)(config(num_labels=LABELS, initializer_range=1e-10))
    for name, weight in model.named_parameters():
        assert round(float(weight.detach().mean()) * 1e9) / 1e9 in (0, 1), name


@pytest.mark.parametrize("head", ["YosoForSequenceClassification", "YosoForTokenClassification"])
def test_a_head_of_another_size_is_drawn_anew_if_asked(head: str, tmp_path: Path) -> None:
    model = build(head)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        getattr(ours, head).from_pretrained(tmp_path, num_labels=LABELS + 2)
    again = getattr(ours, head).from_pretrained(tmp_path, num_labels=LABELS + 2, ignore_mismatched_sizes=True)
    assert again(**texts(head)).logits.shape[-1] == LABELS + 2
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    other = ours.YosoModel.from_pretrained(tmp_path, vocab_size=10, ignore_mismatched_sizes=True)
    assert other.get_input_embeddings().weight.shape == (10, HIDDEN)


@every_head
def test_a_model_can_be_made_in_a_device_context(head: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        assert all(x.is_meta for x in getattr(ours, head)(config()).parameters())
    build(head).save_pretrained(tmp_path)
    with torch.device("cpu"):
        assert not any(x.is_meta for x in getattr(ours, head).from_pretrained(tmp_path).parameters())


@every_head
@both_modes
def test_every_tensor_is_a_parameter_or_a_buffer(head: str, way: str) -> None:
    """Else it would stay behind when the model moves."""
    model = build(head, way)
    model(**texts(head))
    for name, module in model.named_modules():
        assert not [key for key, x in vars(module).items() if isinstance(x, Tensor)], name
    assert not list(model.named_buffers())


@every_head
@both_modes
@pytest.mark.parametrize("where", ["cpu", "disk", "auto", "folder"])
def test_an_offloaded_model_gives_the_same(head: str, way: str, where: str, tmp_path: Path) -> None:
    """Weights that come from memory or a file for the time of a module's call."""
    accelerate = pytest.importorskip("accelerate", reason=ACCELERATE)
    model = build(head, way)
    with torch.no_grad():
        expected = model(**texts(head))
        model.save_pretrained(tmp_path / "model")
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        elif where == "disk":
            accelerate.disk_offload(model, tmp_path / "disk", execution_device="cpu")
        else:
            total = sum(x.numel() * x.element_size() for x in model.parameters())
            options = {"device_map": "auto", "max_memory": {"cpu": int(0.9 * total)}} if where == "auto" else {"device_map": {"": "disk"}}
            model = getattr(ours, head).from_pretrained(tmp_path / "model", **options, offload_folder=tmp_path / "disk")
            assert set(model.hf_device_map.values()) == {"cpu", "disk"} - ({"cpu"} if where == "folder" else set())
        assert any(x.is_meta for x in model.parameters())
        given = texts(head)
        del given["token_type_ids"]
        same(model(**texts(head)), expected, ROUNDING)
        assert model(**given)[0].isfinite().all()


# Configs


def test_a_config_goes_through_text_and_dicts(tmp_path: Path) -> None:
    """With a hidden size that no number of heads divides: sizes are checked where a model is
    made.
    """
    settings = YosoConfig(hidden_size=37, num_hash=5)
    assert YosoConfig.from_dict(settings.to_dict()).to_dict() == settings.to_dict()
    settings.to_json_file(tmp_path / "some.json")
    assert YosoConfig.from_json_file(tmp_path / "some.json").to_dict() == settings.to_dict()
    settings.save_pretrained(tmp_path)
    assert YosoConfig.from_pretrained(tmp_path).to_dict() == settings.to_dict()
    assert '"hidden_size": 37' in settings.to_json_string()
    assert copy.deepcopy(settings).to_dict() == settings.to_dict()


def test_a_config_has_what_every_config_has() -> None:
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"):
        settings = YosoConfig()
        setattr(settings, name, 7)
        assert getattr(settings, name) == 7
        assert getattr(YosoConfig(**{name: 7}), name) == 7
    settings = YosoConfig(num_labels=5)
    assert len(settings.id2label) == len(settings.label2id) == 5
    settings.num_labels = 3
    assert len(settings.id2label) == len(settings.label2id) == 3
    shared = {"return_dict": False, "output_hidden_states": True, "problem_type": "regression", "chunk_size_feed_forward": 5}
    for name, value in (shared | {"bos_token_id": 7, "architectures": ["YosoModel"], "id2label": {0: "yes"}}).items():
        assert getattr(YosoConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 40}, r"^num_attention_heads: hidden_size = 40 does not divide into 3 heads"),
        ({"pad_token_id": 61}, r"^pad_token_id: need an integer between 0 and 60, got 61"),
    ],
    ids=["heads", "padding"],
)
@every_head
def test_sizes_that_do_not_fit_are_named_where_a_model_is_made(changes: dict[str, int], message: str, head: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ours, head)(config(**changes))


@every_head
def test_a_model_leaves_its_callers_config_as_it_was(head: str) -> None:
    settings = config(num_labels=5)
    before = settings.to_dict()
    model = getattr(ours, head)(settings)
    assert model.config is settings
    assert settings.to_dict() == before | {"dtype": settings.to_dict()["dtype"]}
    assert settings.num_labels == 5
