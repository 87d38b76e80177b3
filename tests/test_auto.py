"""Ours in the place of transformers' YOSO: `adopt`, the Auto classes, and the folder for others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub_support import SIZE, checkpoint, in_new_process, tiny, write_bpe, write_checkpoint  # noqa: F401
from model_support import OWN, close, enliven, stock_config
from torch import nn
from transformers import BertConfig, BertModel, RobertaTokenizer

import yoso_core
from yoso_core.model import YosoConfig, YosoForMaskedLM
from yoso_core.model.auto import adopt, export_for_hub
from yoso_core.model.tokenizer import load_tokenizer

HEADS = [
    "YosoModel",
    "YosoForMaskedLM",
    "YosoForSequenceClassification",
    "YosoForMultipleChoice",
    "YosoForTokenClassification",
    "YosoForQuestionAnswering",
]


def stock(head: str, **changes: Any) -> Any:
    model = getattr(transformers, head)(stock_config(YosoConfig(**(SIZE | changes))))
    enliven(model)
    return model.eval()


def inputs(head: str, n: int = 11) -> torch.Tensor:
    ids = torch.randint(5, 300, (2, n), generator=torch.Generator().manual_seed(1))
    return torch.stack([ids, ids.flip(1)], dim=1) if head == "YosoForMultipleChoice" else ids


def numbers(model: nn.Module, ids: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [x for x in model(ids, **kwargs).to_tuple() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("window", [None, 3], ids=["plain", "convolution"])
@pytest.mark.parametrize("head", HEADS)
def test_adopt_keeps_the_object_its_tensors_and_its_outputs(head: str, window: int | None) -> None:
    model = stock(head, conv_window=window, num_labels=3)
    before = numbers(model, inputs(head))
    tensors = dict(model.named_parameters())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm)}
    adopted = adopt(model)
    assert adopted is model
    assert type(model) is getattr(yoso_core.model, head)
    assert all(parameter is tensors[name] for name, parameter in model.named_parameters())
    assert dict(model.named_parameters()).keys() == tensors.keys()
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    for got, expected in zip(numbers(model, inputs(head)), before, strict=True):
        close(got, expected)


@pytest.mark.parametrize("head", HEADS)
def test_adopted_it_is_as_if_made_here(head: str) -> None:
    """No module, no setting of transformers' is left, and the state dict loads into a model of
    ours.
    """
    model = adopt(stock(head, conv_window=3))
    fresh = getattr(yoso_core.model, head)(model.config)
    for name, made in fresh.named_modules():
        adopted = model.get_submodule(name)
        assert type(adopted) is type(made)
        assert vars(made).keys() ^ vars(adopted).keys() <= {"_is_hf_initialized"}
    assert {name for name, _ in model.named_modules()} == {name for name, _ in fresh.named_modules()}
    assert not list(model.named_buffers())
    fresh.load_state_dict(model.state_dict(), strict=True)


def test_adopted_the_configuration_is_ours() -> None:
    model = stock("YosoForMaskedLM", num_hash=5, hidden_dropout_prob=0.25)
    theirs = model.config.to_dict()
    adopt(model)
    assert type(model.config) is YosoConfig
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
    ours = model.config.to_dict()
    assert {name: value for name, value in ours.items() if name in theirs} == theirs
    assert ours.keys() - theirs.keys() == set(OWN)


@pytest.mark.parametrize("head", HEADS)
def test_adopted_padding_has_an_effect(head: str) -> None:
    """transformers' YOSO reads the padding as words; adopted, a padded text gives what it gives
    alone.
    """
    model = stock(head)
    ids, cut = inputs(head), 7
    mask = (torch.arange(ids.shape[-1]) < cut).long().expand(ids.shape)
    shorter = numbers(model, ids[..., :cut])[0]
    stock_padded = numbers(model, ids, attention_mask=mask)[0]
    padded = numbers(adopt(model), ids, attention_mask=mask)[0]

    def of_the_text(x: torch.Tensor) -> torch.Tensor:
        return x[:, :cut] if head in ("YosoModel", "YosoForMaskedLM", "YosoForTokenClassification", "YosoForQuestionAnswering") else x

    assert (of_the_text(stock_padded) - shorter).abs().max() > 1e-3
    close(of_the_text(padded), shorter)


def test_adopted_it_samples() -> None:
    model = adopt(stock("YosoForMaskedLM"))
    expected = numbers(model, inputs(""))[0]
    model.config.use_expectation = False
    sampled = numbers(model, inputs(""))[0]
    assert (sampled - expected).abs().max() > 1e-3
    assert torch.equal(sampled, numbers(model, inputs(""))[0])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_adopted_in_the_middle_of_training() -> None:
    """An optimizer goes on with the same tensors and its own state; train mode, frozen weights,
    hooks and checkpointing stay.
    """
    torch.manual_seed(0)
    model = stock("YosoForMaskedLM", hidden_dropout_prob=0.0).train()
    model.gradient_checkpointing_enable()
    model.yoso.embeddings.requires_grad_(False)
    seen: list[int] = []
    model.cls.register_forward_hook(lambda *_: seen.append(1))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(inputs(""), labels=inputs("")).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()
    adopt(model)
    assert model.training
    assert all(layer.gradient_checkpointing for layer in model.yoso.encoder.layer)
    losses = [step() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < first
    assert len(seen) == 5
    assert not model.yoso.embeddings.word_embeddings.weight.requires_grad
    assert all(optimizer.state[weight]["step"] == 5 for weight in model.parameters() if weight.requires_grad)
    assert model.cls.predictions.decoder.weight is model.yoso.embeddings.word_embeddings.weight


def test_adopted_with_a_layer_of_its_own() -> None:
    """As peft puts them in: what stands in the place of a layer stays there."""

    class Doubled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.layer(x)

    model = stock("YosoModel")
    attention = model.encoder.layer[0].attention.self
    attention.query = Doubled(attention.query)
    attention.value = Doubled(attention.value)
    before = numbers(model, inputs(""))[0]
    close(numbers(adopt(model), inputs(""))[0], before)
    assert type(model.encoder.layer[0].attention.self.query) is Doubled


def test_adopt_keeps_ours_and_refuses_others() -> None:
    ours = tiny("YosoModel")
    assert adopt(ours) is ours
    bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    for other in (bert, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"model: need a YOSO model of transformers, got .*(BertModel|Linear)"):
            adopt(other)
    with pytest.raises(ValueError, match="conv_window: need an odd width"):
        adopt(transformers.YosoModel(transformers.YosoConfig(**SIZE, conv_window=4)))


def test_adopt_refuses_a_replaced_forward_and_changes_nothing() -> None:
    model = stock("YosoModel")
    model.encoder.layer[1].forward = model.encoder.layer[1].forward
    with pytest.raises(ValueError, match="forward of YosoLayer was replaced"):
        adopt(model)
    assert type(model) is transformers.YosoModel
    assert type(model.embeddings) is type(stock("YosoModel").embeddings)


# The Auto classes change for a whole process, so each test has one of its own.

REGISTERED = """
import json, warnings
warnings.simplefilter("error")
import torch, transformers
from yoso_core.model.auto import register_auto_classes
stock = {name: type(getattr(transformers, name).from_config(transformers.YosoConfig(**SIZE))).__module__ for name in AUTO[:1]}
register_auto_classes()
register_auto_classes()
found = {}
for name in AUTO:
    model = getattr(transformers, name).from_pretrained(PATH)
    found[name] = [type(model).__module__, type(model).__name__]
tokenizer = transformers.AutoTokenizer.from_pretrained(PATH)
unmask = transformers.pipeline("fill-mask", model=PATH, top_k=3)
print(json.dumps({
    "stock": stock,
    "models": found,
    "config": type(transformers.AutoConfig.from_pretrained(PATH)).__module__,
    "tokens": tokenizer.tokenize("Paris is the <mask> of"),
    "pipeline": [type(unmask.model).__module__, [row["token"] for row in unmask("Paris is the <mask> of France.")]],
    "theirs": type(transformers.AutoModel.from_config(transformers.YosoConfig(**SIZE))).__module__,
}))
"""

AUTO = {
    "AutoModel": "YosoModel",
    "AutoModelForPreTraining": "YosoForPreTraining",
    "AutoModelForMaskedLM": "YosoForMaskedLM",
    "AutoModelForSequenceClassification": "YosoForSequenceClassification",
    "AutoModelForMultipleChoice": "YosoForMultipleChoice",
    "AutoModelForTokenClassification": "YosoForTokenClassification",
    "AutoModelForQuestionAnswering": "YosoForQuestionAnswering",
}


@pytest.mark.slow
def test_registered_the_auto_classes_give_ours(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    """With a tokenizer in the files that AutoTokenizer alone gets wrong. transformers' own
    configuration still gives its own model.
    """
    folder = tmp_path / "model"
    tiny("YosoForMaskedLM").save_pretrained(folder)
    write_bpe(folder)
    report = json.loads(in_new_process(f"SIZE, AUTO, PATH = {SIZE!r}, {list(AUTO)!r}, {str(folder)!r}\n{REGISTERED}", tmp_path))
    assert report["models"] == {auto: ["yoso_core.model.heads", head] for auto, head in AUTO.items()}
    assert report["config"] == "yoso_core.model.configuration"
    assert report["stock"] == {"AutoModel": "transformers.models.yoso.modeling_yoso"}
    assert report["theirs"] == "transformers.models.yoso.modeling_yoso"
    assert report["tokens"] == ["Paris", "Ġis", "Ġthe", " <mask>", "Ġof"]
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("Paris is the <mask> of France.", return_tensors="pt")["input_ids"]
    scores = numbers(tiny("YosoForMaskedLM"), ids)[0][0, ids[0] == tokenizer.mask_token_id]
    assert report["pipeline"] == ["yoso_core.model.heads", scores[0].topk(3).indices.tolist()]


LOADED = """
import json, transformers
model = transformers.AutoModelForMaskedLM.from_pretrained(PATH, trust_remote_code=True)
base = [cls.__module__ for cls in type(model).__mro__]
tokenizer = transformers.AutoTokenizer.from_pretrained(PATH)
inputs = tokenizer(["Paris is the <mask> of France.", "A <mask>."], padding=True, return_tensors="pt")
model.eval().save_pretrained(AGAIN)
again = transformers.AutoModelForMaskedLM.from_pretrained(AGAIN, trust_remote_code=True).eval()
classifier = transformers.AutoModelForSequenceClassification.from_pretrained(PATH, trust_remote_code=True)
print(json.dumps({
    "ours": "yoso_core.model.heads" in base,
    "config": [cls.__module__ for cls in type(model.config).__mro__].count("yoso_core.model.configuration"),
    "tokens": tokenizer.tokenize("Paris is the <mask>"),
    "logits": model(**inputs).logits[1, 2, :5].tolist(),
    "again": again(**inputs).logits[1, 2, :5].tolist(),
    "grad": again.config.grad,
    "classifier": "yoso_core.model.heads" in [cls.__module__ for cls in type(classifier).__mro__],
}))
"""


@pytest.mark.slow
def test_an_exported_folder_loads_with_remote_code(tmp_path: Path) -> None:
    model = tiny("YosoForMaskedLM", grad="exact")
    tokenizer = load_tokenizer(write_bpe(tmp_path / "bpe"))
    folder = export_for_hub(model, tmp_path / "export", tokenizer)
    assert {path.name for path in folder.glob("*.py")} == {"modeling_yoso_core.py"}
    code = f"PATH, AGAIN = {str(folder)!r}, {str(tmp_path / 'again')!r}\n{LOADED}"
    report = json.loads(in_new_process(code, tmp_path).splitlines()[-1])
    batch = tokenizer(["Paris is the <mask> of France.", "A <mask>."], padding=True, return_tensors="pt")
    expected = numbers(model, batch["input_ids"], attention_mask=batch["attention_mask"])[0][1, 2, :5]
    assert report["logits"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert report["again"] == pytest.approx(report["logits"], abs=1e-6)
    assert (report["ours"], report["config"], report["classifier"], report["grad"]) == (True, 1, True, "exact")
    assert report["tokens"] == ["Paris", "Ġis", "Ġthe", " <mask>"]


def test_an_exported_folder_without_remote_code_is_a_plain_checkpoint(tmp_path: Path) -> None:
    model = tiny("YosoForMaskedLM")
    folder = export_for_hub(model, tmp_path)
    assert not hasattr(model.config, "auto_map")
    for loaded in (YosoForMaskedLM.from_pretrained(folder), transformers.YosoForMaskedLM.from_pretrained(folder)):
        close(numbers(loaded.eval(), inputs(""))[0], numbers(model, inputs(""))[0])


def test_export_is_for_our_models(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model: need a YOSO model of yoso_core, got YosoModel; adopt\(\)"):
        export_for_hub(stock("YosoModel"), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder: .* is a file"):
        export_for_hub(tiny("YosoModel"), tmp_path / "file")


def test_export_of_an_adopted_model(tmp_path: Path) -> None:
    model = adopt(stock("YosoForSequenceClassification", num_labels=3))
    folder = export_for_hub(model, tmp_path, RobertaTokenizer.from_pretrained(write_bpe(tmp_path / "bpe")))
    loaded = yoso_core.model.YosoForSequenceClassification.from_pretrained(folder).eval()
    close(numbers(loaded, inputs(""))[0], numbers(model, inputs(""))[0])
