"""Checkpoints of the authors' code: every key of their layouts, and what it means."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_support import write_bpe
from model_support import close
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from yoso_core.cli import app
from yoso_core.model import YosoConfig, YosoForMaskedLM, YosoForPreTraining, YosoModel
from yoso_core.model.original import convert_original_checkpoint

WORDS, POSITIONS, TYPES, DIM, HIDDEN, HEADS, TAU, WINDOW = 50, 18, 2, 24, 40, 2, 5, 3

# The keys that convert_weight_keys of the authors' code lists (mlpen/Nystromformer, code/utils.py),
# with the shapes of their modules.
EMBEDDINGS = {
    "model.embeddings.word_embeddings.weight": (WORDS, DIM),
    "model.embeddings.position_embeddings.weight": (POSITIONS, DIM),
    "model.embeddings.token_type_embeddings.weight": (TYPES, DIM),
    "model.embeddings.norm.weight": (DIM,),
    "model.embeddings.norm.bias": (DIM,),
}
ATTENTION = {
    "mha.W_q.weight": (DIM, DIM),
    "mha.W_q.bias": (DIM,),
    "mha.W_k.weight": (DIM, DIM),
    "mha.W_k.bias": (DIM,),
    "mha.W_v.weight": (DIM, DIM),
    "mha.W_v.bias": (DIM,),
    "mha.ff.weight": (DIM, DIM),
    "mha.ff.bias": (DIM,),
    "norm1.weight": (DIM,),
    "norm1.bias": (DIM,),
    "norm2.weight": (DIM,),
    "norm2.bias": (DIM,),
}
FEED_FORWARD = {
    "ff1.weight": (HIDDEN, DIM),
    "ff1.bias": (HIDDEN,),
    "ff2.weight": (DIM, HIDDEN),
    "ff2.bias": (DIM,),
}
POOLER = {"model.pooler.weight": (DIM, DIM), "model.pooler.bias": (DIM,)}
MASKED_LM = {
    "mlm.dense.weight": (DIM, DIM),
    "mlm.dense.bias": (DIM,),
    "mlm.norm.weight": (DIM,),
    "mlm.norm.bias": (DIM,),
    "mlm.mlm_class.weight": (WORDS, DIM),
    "mlm.mlm_class.bias": (WORDS,),
}
ROBERTA = EMBEDDINGS | {f"model.transformer_{i}.{key}": shape for i in range(2) for key, shape in (ATTENTION | FEED_FORWARD).items()}

# mlpen/YOSO, encoders/backbones/efficient_attention.py: Backbone.encoders, Block.ff is a Sequential
# of Linear, GELU, Linear (listed in mlpen/mra-attention,
# RoBERTa/get_roberta_pretrained_weights.py); yoso_v2/yoso.py: YOSOAttention.conv.
# mlpen/Nystromformer, reorganized_code/BERT/model.py: ModelWrapper.sen_class, Model.pooler.
SEQUENTIAL = {key.replace("ff1", "ff.0").replace("ff2", "ff.2"): shape for key, shape in FEED_FORWARD.items()}
CONV = {"mha.attn.conv.weight": (HEADS, 1, WINDOW, 1)}
SENTENCES = {"sen_class.weight": (2, DIM), "sen_class.bias": (2,)}
BACKBONE = EMBEDDINGS | {
    f"model.backbone.backbone.encoders.{i}.{key}": shape for i in range(2) for key, shape in (ATTENTION | SEQUENTIAL | CONV).items()
}
SHARED = EMBEDDINGS | {f"model.backbone.backbone.encoder.{key}": shape for key, shape in (ATTENTION | SEQUENTIAL).items()}

LAYOUTS = {
    "roberta": ROBERTA | MASKED_LM,
    "backbone with a convolution": BACKBONE | MASKED_LM,
    "bert": BACKBONE | POOLER | MASKED_LM | SENTENCES,
    "shared block": SHARED | MASKED_LM,
}


def state_dict(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        noise = 0.4 * torch.randn(shape, generator=generator)
        state[key] = 1 + noise if re.search(r"norm\d?\.weight", key) else noise
    if "mlm.mlm_class.weight" in state:  # the authors' code makes them one tensor
        state["mlm.mlm_class.weight"] = state["model.embeddings.word_embeddings.weight"].clone()
    return state


def written(path: Path, stored: Any) -> Path:
    torch.save(stored, path)
    return path


def authors_forward(state: dict[str, Tensor], ids: Tensor, first_position: int) -> tuple[Tensor, Tensor]:
    """The authors' model from its own parameters, with the expected attention: masked-LM scores,
    and the scores of the sentence order.
    """

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    n = len(ids)
    x = state["model.embeddings.word_embeddings.weight"][ids]
    x = x + state["model.embeddings.position_embeddings.weight"][first_position : first_position + n]
    x = norm("model.embeddings.norm", x + state["model.embeddings.token_type_embeddings.weight"][0])
    for i in range(2):
        block = next(b for b in (f"model.transformer_{i}", f"model.backbone.backbone.encoders.{i}", "model.backbone.backbone.encoder")
                     if f"{b}.norm1.weight" in state)  # fmt: skip
        first, second = ("ff1", "ff2") if f"{block}.ff1.weight" in state else ("ff.0", "ff.2")
        q, k, v = (linear(f"{block}.mha.W_{which}", x).reshape(n, HEADS, -1).transpose(0, 1) for which in "qkv")
        angle = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)).clamp(-1, 1).acos()
        context = F.normalize((1 - angle / math.pi) ** TAU @ v, dim=-1)
        conv = state.get(f"{block}.mha.attn.conv.weight")
        if conv is not None:
            context = context + F.conv2d(v[None], conv, padding=(WINDOW // 2, 0), groups=HEADS)[0]
        x = norm(f"{block}.norm1", x + linear(f"{block}.mha.ff", context.transpose(0, 1).reshape(n, DIM)))
        x = norm(f"{block}.norm2", x + linear(f"{block}.{second}", F.gelu(linear(f"{block}.{first}", x))))
    scores = linear("mlm.mlm_class", norm("mlm.norm", F.gelu(linear("mlm.dense", x))))
    order = linear("sen_class", torch.tanh(linear("model.pooler", x[0]))) if "sen_class.weight" in state else scores.new_zeros(2)
    return scores, order


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_means_what_it_means_in_the_authors_code(layout: str, tmp_path: Path) -> None:
    state = state_dict(LAYOUTS[layout])
    path = written(tmp_path / "cp-0001.model", {"model_state_dict": state})
    model = convert_original_checkpoint(path, num_attention_heads=HEADS, hash_code_len=TAU, num_hidden_layers=2)
    assert not model.training
    ids = torch.tensor([0, 7, 8, 9, 10, 11, 7, 49, 2])
    with torch.no_grad():
        got = model(ids[None])
    if layout == "bert":
        assert type(model) is YosoForPreTraining
        scores, order = authors_forward(state, ids, first_position=0)
        close(got.prediction_logits[0], scores)
        close(got.sop_logits[0], order)
        assert model.config.max_position_embeddings == POSITIONS
    else:
        assert type(model) is YosoForMaskedLM
        close(got.logits[0], authors_forward(state, ids, first_position=2)[0])
        assert model.config.max_position_embeddings == POSITIONS - 2


def test_the_configuration_is_read_from_the_shapes(tmp_path: Path) -> None:
    model = convert_original_checkpoint(written(tmp_path / "a.model", state_dict(BACKBONE | MASKED_LM)))
    config = model.config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.type_vocab_size) == (WORDS, DIM, HIDDEN, TYPES)
    assert (config.num_hidden_layers, config.num_attention_heads, config.conv_window) == (2, HEADS, WINDOW)
    assert (config.layer_norm_eps, config.hidden_act, config.tie_word_embeddings) == (1e-5, "gelu", True)
    assert model.cls.predictions.decoder.weight is model.yoso.embeddings.word_embeddings.weight


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"step": 3}, "epoch": 7},
        lambda state: {"model_state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
    ],
    ids=["bare", "with the state of training", "from inside DataParallel"],
)
def test_wrappings(wrap: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    state = state_dict(ROBERTA | MASKED_LM)
    model = convert_original_checkpoint(written(tmp_path / "a.cp", wrap(state)), num_attention_heads=HEADS)
    assert torch.equal(model.yoso.encoder.layer[1].attention.self.key.weight, state["model.transformer_1.mha.W_k.weight"])


def test_without_a_head(tmp_path: Path) -> None:
    assert type(convert_original_checkpoint(written(tmp_path / "a", state_dict(ROBERTA)), num_attention_heads=HEADS)) is YosoModel


def test_a_shared_block_becomes_every_layer(tmp_path: Path) -> None:
    """Their number is not in the file; the configuration has it."""
    state = state_dict(SHARED)
    path = written(tmp_path / "a", state)
    (tmp_path / "config.json").write_text(json.dumps({"model": AUTHORS_CONFIG | {"num_layers": 3}}))
    model = convert_original_checkpoint(path, tmp_path / "config.json", first_position=0)
    assert len(model.encoder.layer) == 3
    for layer in model.encoder.layer:
        assert torch.equal(layer.intermediate.dense.weight, state["model.backbone.backbone.encoder.ff.0.weight"])
    fewer = YosoConfig(**model.config.to_dict() | {"num_hidden_layers": 2})
    assert len(convert_original_checkpoint(path, fewer, first_position=0).encoder.layer) == 2


@pytest.mark.parametrize("first_position", [0, 1, 2])
def test_the_first_token_keeps_its_position(first_position: int, tmp_path: Path) -> None:
    state = state_dict(ROBERTA)
    path = written(tmp_path / "a", state)
    model = convert_original_checkpoint(path, first_position=first_position, num_attention_heads=HEADS)
    table = model.embeddings.position_embeddings.weight
    assert torch.equal(table[2:], state["model.embeddings.position_embeddings.weight"][first_position:])
    assert len(table) == model.config.max_position_embeddings + 2


def test_a_pooler_without_its_classifier_is_left_out_and_said(tmp_path: Path) -> None:
    path = written(tmp_path / "a", state_dict(ROBERTA | POOLER | MASKED_LM))
    with pytest.warns(UserWarning, match=r"model\.pooler is left out"):
        assert type(convert_original_checkpoint(path, num_attention_heads=HEADS)) is YosoForMaskedLM


def test_classes_beyond_the_sentence_order_are_left_out_and_said(tmp_path: Path) -> None:
    """The authors' configurations ask for four classes, of which pre-training knows two."""
    state = state_dict(LAYOUTS["bert"] | {"sen_class.weight": (4, DIM), "sen_class.bias": (4,)})
    with pytest.warns(UserWarning, match="sen_class has 4 classes"):
        model = convert_original_checkpoint(written(tmp_path / "a", state))
    assert torch.equal(model.sop_classifier.out_proj.weight, state["sen_class.weight"][:2])
    assert torch.equal(model.sop_classifier.out_proj.bias, state["sen_class.bias"][:2])


def test_a_decoder_of_its_own_is_kept(tmp_path: Path) -> None:
    state = state_dict(ROBERTA | MASKED_LM)
    state["mlm.mlm_class.weight"] += 1
    model = convert_original_checkpoint(written(tmp_path / "a", state), num_attention_heads=HEADS)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.cls.predictions.decoder.weight, state["mlm.mlm_class.weight"])
    model.save_pretrained(tmp_path / "saved")
    again = YosoForMaskedLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.cls.predictions.decoder.weight, state["mlm.mlm_class.weight"])
    assert torch.equal(again.yoso.embeddings.word_embeddings.weight, state["model.embeddings.word_embeddings.weight"])


FOREIGN = {"sen_classifer.dense.weight": (DIM, DIM), "model.embeddings.dense.weight": (DIM, DIM), "model.transformer_0.mha.rotary": (3,)}


def test_unknown_keys_are_named_all_of_them(tmp_path: Path) -> None:
    path = written(tmp_path / "a", state_dict(ROBERTA | FOREIGN))
    with pytest.raises(ValueError, match="no place") as error:
        convert_original_checkpoint(path, num_attention_heads=HEADS)
    assert all(key in str(error.value) for key in FOREIGN)


def test_unknown_keys_can_be_dropped_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a", state_dict(ROBERTA | FOREIGN))
    drop = ["sen_classifer", "model.embeddings.dense", "model.transformer_0.mha.rotary"]
    assert type(convert_original_checkpoint(path, drop=drop, num_attention_heads=HEADS)) is YosoModel
    with pytest.raises(ValueError, match="drop: the file has no key 'sen_class'"):
        convert_original_checkpoint(path, drop=["sen_class"], num_attention_heads=HEADS)


def without(shapes: dict[str, tuple[int, ...]], *keys: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes.items() if key not in keys}


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (ROBERTA, {}, "num_attention_heads: the shapes of this file do not show it"),
        (ROBERTA, {"num_attention_heads": 5}, "num_attention_heads: hidden_size = 24 does not divide"),
        (BACKBONE, {"num_attention_heads": 3}, "num_attention_heads: 3 was given, but the shapes of the file say 2"),
        (ROBERTA, {"vocab_size": 51}, "vocab_size: 51 was given, but the shapes of the file say 50"),
        (SHARED, {"num_attention_heads": HEADS}, "num_hidden_layers: the layers of this file share one block"),
        (without(ROBERTA, "model.transformer_1.norm1.bias"), {"num_attention_heads": HEADS}, r"lacks .*layer\.1\.attention\.output"),
        (without(ROBERTA, "model.embeddings.word_embeddings.weight"), {}, "need a checkpoint of the authors' YOSO"),
        (EMBEDDINGS, {}, "no layers"),
        (ROBERTA | {"model.transformer_1.mha.W_q.weight": (DIM, DIM + 1)}, {"num_attention_heads": HEADS}, r"shape \(24, 25\), need"),
        (ROBERTA, {"num_attention_heads": HEADS, "first_position": 3}, "first_position: need an integer between 0 and 2"),
    ],
    ids=["no heads", "heads", "heads differ", "size differs", "shared", "missing", "no words", "no layers", "shape", "positions"],
)
def test_what_does_not_fit_raises(shapes: dict[str, tuple[int, ...]], settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert_original_checkpoint(written(tmp_path / "a", state_dict(shapes)), **settings)


def test_a_setting_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="num_head: YosoConfig has no such field"):
        convert_original_checkpoint(written(tmp_path / "a", state_dict(ROBERTA)), num_head=HEADS)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path: there is no file"):
        convert_original_checkpoint(tmp_path / "nothing")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        convert_original_checkpoint(tmp_path / "text")
    with pytest.raises(ValueError, match="holds a dict with 'a'"):
        convert_original_checkpoint(written(tmp_path / "numbers", {"a": 1}))


class Trap:
    """Reading this without ``weights_only`` would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "sprung")


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    path = written(tmp_path / "a.cp", {"model_state_dict": state_dict(ROBERTA), "scheduler": Trap(tmp_path / "sprung")})
    with pytest.raises(ValueError, match=r"cannot be read as weights .* the \.model file"):
        convert_original_checkpoint(path)
    assert not (tmp_path / "sprung").exists()


# The section "model" of mlpen/YOSO's BERT/models/yoso-v2-32-small/config.json, in the sizes of this
# file.
AUTHORS_CONFIG = {
    "mixed_precision": True, "vocab_size": WORDS, "num_sen_type": TYPES, "max_seq_len": POSITIONS, "num_classes": 4, "shared_weight": False,
    "num_layers": 2, "dropout_prob": 0.2, "embedding_dim": DIM, "dim": DIM, "hidden_dim": HIDDEN, "num_head": HEADS, "head_dim": 12,
    "model_type": "efficient_attention", "attn_type": "yoso-v2", "hashcode_len": 7, "num_hash_f": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"use_expectation": False, "hash_code_len": 7, "num_hash": 16}),
        ({"num_hash_f": -1}, {"use_expectation": True, "hash_code_len": 7, "num_hash": 64}),
        ({"attn_type": "yoso-v1-e", "hash_code_len": 6}, {"use_expectation": True, "hash_code_len": 7}),
        ({"attn_type": "yoso-v1", "use_fast_hash": False, "n2_backward": True}, {"use_fast_hash": False, "lsh_backward": False}),
    ],
    ids=["sampled", "expectation", "first expectation", "first sampled"],
)
def test_the_authors_configuration(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": AUTHORS_CONFIG | changes}))
    model = convert_original_checkpoint(written(tmp_path / "a", state_dict(ROBERTA)), tmp_path / "config.json")
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert (model.config.num_attention_heads, model.config.hidden_dropout_prob, model.config.layer_norm_eps) == (HEADS, 0.2, 1e-5)


def test_other_configurations(tmp_path: Path) -> None:
    path = written(tmp_path / "a", state_dict(ROBERTA))
    fields = {"vocab_size": WORDS, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": HIDDEN}
    config = YosoConfig(**fields, max_position_embeddings=POSITIONS - 2, type_vocab_size=TYPES, num_hash=5)
    assert convert_original_checkpoint(path, config).config.num_hash == 5
    config.save_pretrained(tmp_path / "hf")
    assert convert_original_checkpoint(path, tmp_path / "hf" / "config.json").config.num_hash == 5
    with pytest.raises(ValueError, match="max_position_embeddings: 4096 was given, but the shapes of the file say 16"):
        convert_original_checkpoint(path, YosoConfig(**fields, type_vocab_size=TYPES))
    for text, message in (
        ("{}", "need a config.json of the authors"),
        ('{"model": {"attn_type": "softmax"}}', "attention 'softmax'"),
        ("[", "need a config.json of the authors"),
    ):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            convert_original_checkpoint(path, tmp_path / "wrong.json")


def yoso(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="yoso")


def test_the_command_writes_what_from_pretrained_reads(tmp_path: Path) -> None:
    state = state_dict(ROBERTA | POOLER | MASKED_LM)
    path, output = written(tmp_path / "a.model", {"model_state_dict": state}), tmp_path / "converted"
    result = yoso("convert", path, "--output", output, "--num-attention-heads", HEADS, "--tokenizer", write_bpe(tmp_path / "bpe"))
    assert result.exit_code == 0, result.output
    assert "YosoForMaskedLM" in result.output
    assert "note: model.pooler is left out" in result.output
    model = YosoForMaskedLM.from_pretrained(output)
    assert torch.equal(model.yoso.encoder.layer[0].output.dense.weight, state["model.transformer_0.ff2.weight"])
    assert (output / "tokenizer.json").exists()


def test_the_command_in_json(tmp_path: Path) -> None:
    path = written(tmp_path / "a.model", state_dict(ROBERTA | FOREIGN))
    drop = [word for key in FOREIGN for word in ("--drop", key)]
    result = yoso("convert", path, "--output", tmp_path / "b", "--num-attention-heads", HEADS, "--num-hash", 9, *drop, "--json")
    report = json.loads(result.stdout)
    assert (report["model"], report["config"]["num_hash"], report["notes"]) == ("YosoModel", 9, [])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--num-attention-heads: the shapes of this file do not show it; give it, or --config"),
        (["--num-attention-heads", "5"], "--num-attention-heads: hidden_size = 24"),
        (["--config", "missing.json"], "--config: need a config.json"),
        (["--drop", "what"], "--drop: the file has no key 'what'"),
        (["--tokenizer", "/no/such/folder"], "--tokenizer: there is no folder /no/such/folder"),
    ],
    ids=["heads", "wrong heads", "config", "drop", "tokenizer"],
)
def test_the_command_says_what_is_wrong_in_one_line(args: list[str], message: str, tmp_path: Path) -> None:
    result = yoso("convert", written(tmp_path / "a", state_dict(ROBERTA)), "--output", tmp_path / "b", *args)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert not (tmp_path / "b").exists()


def test_the_command_names_its_argument(tmp_path: Path) -> None:
    assert "PATH: there is no file" in yoso("convert", tmp_path / "none", "--output", tmp_path / "b").stderr
    path = written(tmp_path / "a", state_dict(ROBERTA))
    assert "--output: " in yoso("convert", path, "--output", path).stderr
