"""Checkpoints and configs: what transformers' YOSO writes, ours reads, and the other way round."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_support import OWN, TINY, WAYS, close, config, ids, lively, stock, stock_config
from torch import nn
from transformers.models.yoso import modeling_yoso as stock_heads

import yoso_core
from yoso_core import model as ours
from yoso_core.model import YosoConfig, YosoForMaskedLM, YosoForSequenceClassification, YosoModel

BERT = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}

SHARED = [
    "YosoModel",
    "YosoForMaskedLM",
    "YosoForSequenceClassification",
    "YosoForMultipleChoice",
    "YosoForTokenClassification",
    "YosoForQuestionAnswering",
]
"""Heads that transformers has too."""

every_head = pytest.mark.parametrize("head", SHARED)


def words_for(head: str) -> torch.Tensor:
    return ids(2, 2, 9) if head == "YosoForMultipleChoice" else ids(2, 9)


def read(head: Any, folder: Path, **options: Any) -> Any:
    """A model whose checkpoint had everything it needs and nothing else."""
    model, report = head.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def same(model: Any, other: Any, words: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The same output, hidden states and all."""
    with torch.no_grad():
        got, expected = (m(words, output_hidden_states=True) for m in (model, other))
    close(got[0], expected[0], tolerance)
    for x, y in zip(got.hidden_states, expected.hidden_states, strict=True):
        close(x, y, tolerance)


def as_safetensors(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").exists()


def in_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="12KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    assert len(set(index["weight_map"].values())) > 2


def as_pytorch_bin(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_old_pytorch_bin(model: Any, folder: Path) -> None:
    """As transformers wrote them before 2023: with the numbers of positions and types among the
    weights, and every tied weight.
    """
    model.config.save_pretrained(folder)
    prefix = "" if type(model).__name__ == "YosoModel" else "yoso."
    table = torch.arange(model.config.max_position_embeddings)[None] + 2
    numbers = {f"{prefix}embeddings.position_ids": table, f"{prefix}embeddings.token_type_ids": torch.zeros_like(table)}
    torch.save(model.state_dict() | numbers, folder / "pytorch_model.bin")


WRITERS = [as_safetensors, in_shards, as_pytorch_bin, as_old_pytorch_bin]
every_kind_of_file = pytest.mark.parametrize("write", WRITERS, ids=lambda function: function.__name__)


# Both ways


@every_head
@every_kind_of_file
def test_ours_reads_what_transformers_writes(write: Any, head: str, tmp_path: Path) -> None:
    theirs = stock(lively(head, conv_window=3, num_labels=2))
    write(theirs, tmp_path)
    model = read(getattr(ours, head), tmp_path)
    assert not model.training
    same(model, theirs, words_for(head))


@every_head
@pytest.mark.parametrize("write", WRITERS[:3], ids=lambda function: function.__name__)
def test_transformers_reads_what_ours_writes(write: Any, head: str, tmp_path: Path) -> None:
    model = lively(head, conv_window=3, num_labels=2)
    write(model, tmp_path)
    theirs = read(getattr(stock_heads, head), tmp_path)
    assert theirs.config.conv_window == 3
    same(theirs, model, words_for(head))
    same(read(getattr(ours, head), tmp_path), model, words_for(head), 0)


@every_head
def test_weights_have_the_names_and_shapes_of_transformers(head: str) -> None:
    model = lively(head, conv_window=3, type_vocab_size=2, num_labels=2)
    theirs = getattr(stock_heads, head)(stock_config(model.config))
    assert {name: x.shape for name, x in model.state_dict().items()} == {name: x.shape for name, x in theirs.state_dict().items()}
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_every_weight_of_the_file_is_read(tmp_path: Path) -> None:
    """One that is missing, or has no place, is reported; one of another shape is refused."""
    model = lively("YosoForMaskedLM")
    weights = model.state_dict()
    del weights["yoso.encoder.layer.1.output.dense.bias"]
    model.config.save_pretrained(tmp_path)
    torch.save(weights | {"yoso.encoder.layer.7.output.dense.bias": torch.zeros(36)}, tmp_path / "pytorch_model.bin")
    _, report = YosoForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"yoso.encoder.layer.1.output.dense.bias"}
    assert set(report["unexpected_keys"]) == {"yoso.encoder.layer.7.output.dense.bias"}
    with pytest.raises(RuntimeError, match=r"mismatch"):
        YosoForMaskedLM.from_pretrained(tmp_path, intermediate_size=41)


def test_pre_training_goes_through_files(tmp_path: Path) -> None:
    model = lively("YosoForPreTraining")
    model.save_pretrained(tmp_path)
    again = read(ours.YosoForPreTraining, tmp_path)
    with torch.no_grad():
        for x, y in zip(again(ids(2, 9), return_dict=False), model(ids(2, 9), return_dict=False), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    masked_lm, report = YosoForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    close(masked_lm(ids(2, 9)).logits, model(ids(2, 9)).prediction_logits)


# Tied weights


@pytest.mark.parametrize("head", ["YosoForMaskedLM", "YosoForPreTraining"])
@every_kind_of_file
def test_tied_weights_are_one_after_reading(write: Any, head: str, tmp_path: Path) -> None:
    write(lively(head), tmp_path)
    model = read(getattr(ours, head), tmp_path)
    predictions = model.cls.predictions
    assert predictions.decoder.weight is model.get_input_embeddings().weight
    assert predictions.decoder.bias is predictions.bias
    with torch.no_grad():
        before = model(ids(1, 5))[0]
        predictions.bias.add_(1)
        close(model(ids(1, 5))[0], before + 1)


def test_a_safetensors_file_holds_tied_weights_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = lively("YosoForMaskedLM")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"yoso.embeddings.word_embeddings.weight", "cls.predictions.bias"} <= names
    assert not {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} & names


def test_untied_weights_stay_apart(tmp_path: Path) -> None:
    model = lively("YosoForMaskedLM", tie_word_embeddings=False)
    assert model.cls.predictions.decoder.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    same(read(YosoForMaskedLM, tmp_path), model, ids(2, 9), 0)
    same(read(stock_heads.YosoForMaskedLM, tmp_path), model, ids(2, 9))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_bias_of_the_words_is_what_it_is_in_transformers(tied: bool) -> None:
    """One with the decoder's where words are tied. Untied, it is there and has no effect, which
    goes for BERT too.
    """
    model = lively("YosoForMaskedLM", tie_word_embeddings=tied)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**{**BERT, "tie_word_embeddings": tied}))
    for m in (model, stock(model), bert):
        predictions = m.cls.predictions
        assert (predictions.decoder.bias is predictions.bias) == tied
        assert ("cls.predictions.decoder.bias" in dict(m.named_parameters())) != tied
        m(ids(2, 9), labels=ids(2, 9)).loss.backward()
        assert (predictions.bias.grad is not None) == tied
        m.resize_token_embeddings(70, mean_resizing=False)
        assert m.cls.predictions.bias.shape == m.cls.predictions.decoder.bias.shape == (70,)


# A base model from a head's checkpoint and back


@pytest.mark.parametrize("head", [name for name in SHARED if name != "YosoModel"])
def test_a_base_model_reads_a_heads_checkpoint(head: str, tmp_path: Path) -> None:
    whole = lively(head)
    whole.save_pretrained(tmp_path)
    base, report = YosoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    same(base, whole.yoso, ids(2, 9), 0)
    base.save_pretrained(tmp_path / "base")
    again, report = getattr(ours, head).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(key.startswith("yoso.") for key in report["missing_keys"])
    assert report["missing_keys"]
    same(again.yoso, base, ids(2, 9), 0)
    with torch.no_grad():
        assert again(words_for(head))[0].isfinite().all()


def test_one_head_reads_anothers_checkpoint(tmp_path: Path) -> None:
    lively("YosoForMaskedLM").save_pretrained(tmp_path)
    model, report = YosoForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert {key.partition(".")[0] for key in report["missing_keys"]} == {"classifier"}
    assert {key.partition(".")[0] for key in report["unexpected_keys"]} == {"cls"}
    assert model(ids(2, 9)).logits.shape == (2, 3)


# New weights


@pytest.mark.parametrize("head", [*SHARED, "YosoForPreTraining"])
def test_new_weights_are_drawn_as_in_transformers(head: str) -> None:
    """Normal with the config's deviation, LayerNorms the identity, biases and the padding's word
    zero.
    """
    torch.manual_seed(0)
    settings = config(hidden_size=96, initializer_range=0.05, conv_window=3)
    model = getattr(ours, head)(settings)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        elif isinstance(module, nn.Linear):
            assert (module.bias == 0).all(), name
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.numel() > 5000:
            assert float(module.weight.detach().std()) == pytest.approx(0.05, rel=0.05), name
            assert abs(float(module.weight.detach().mean())) < 0.003, name
    assert not model.get_input_embeddings().weight[1].any()


def test_a_copied_model_is_a_model_of_its_own() -> None:
    model = lively("YosoForMaskedLM", use_expectation=False)
    twin = copy.deepcopy(model)
    same(twin, model, ids(2, 9), 0)
    twin.config.num_hash = 3
    with torch.no_grad():
        twin.get_input_embeddings().weight.zero_()
    assert model.config.num_hash == 8
    assert model.cls.predictions.decoder.weight.any()
    assert not twin.cls.predictions.decoder.weight.any()


# More words, more positions


@pytest.mark.parametrize("size", [80, 40], ids=["more", "fewer"])
@pytest.mark.parametrize("head", ["YosoForMaskedLM", "YosoForPreTraining"])
def test_the_vocabulary_can_be_resized(head: str, size: int, tmp_path: Path) -> None:
    model = lively(head)
    words = ids(2, 9) % 37 + 3
    with torch.no_grad():
        before = model(words)[0]
    model.resize_token_embeddings(size, mean_resizing=False)
    predictions, kept = model.cls.predictions, min(size, 61)
    assert model.config.vocab_size == size
    assert predictions.decoder.weight is model.get_input_embeddings().weight
    assert predictions.decoder.bias is predictions.bias
    assert predictions.bias.shape == (size,)
    with torch.no_grad():
        after = model(words)[0]
    assert after.shape == (2, 9, size)
    close(after[..., :kept], before[..., :kept])
    assert model(words, labels=torch.full((2, 9), size - 1)).loss.isfinite()
    with pytest.raises(ValueError, match=r"^input_ids: need ids in \[0, " + str(size)):
        model(torch.tensor([[size]]))
    model.save_pretrained(tmp_path)
    again = read(getattr(ours, head), tmp_path)
    close(again(words)[0], after)
    assert again.cls.predictions.decoder.bias is again.cls.predictions.bias


def test_embeddings_can_be_exchanged() -> None:
    model = lively("YosoForMaskedLM", tie_word_embeddings=False)
    table, decoder = nn.Embedding(50, 36), nn.Linear(36, 50)
    model.set_input_embeddings(table)
    model.set_output_embeddings(decoder)
    assert model.get_input_embeddings() is model.yoso.embeddings.word_embeddings is table
    assert model.get_output_embeddings() is decoder
    assert model.cls.predictions.bias is decoder.bias
    assert model(ids(2, 9) % 50).logits.shape == (2, 9, 50)


@pytest.mark.parametrize("head", ["YosoModel", "YosoForMaskedLM"])
@pytest.mark.parametrize("wanted", [25, 48, 100], ids="to{}".format)
def test_the_position_table_can_be_lengthened(wanted: int, head: str, tmp_path: Path) -> None:
    """By repeating the learned rows in order, from row 2 on: 24 of them."""
    model = lively(head).requires_grad_(True)
    table = model.base_model.embeddings.position_embeddings.weight.detach().clone()
    with torch.no_grad():
        before = model(ids(2, 24))[0]
        with pytest.raises(ValueError, match=r"^input_ids: 25 tokens are more than max_position_embeddings = 24"):
            model(ids(2, 25))
    model.extend_positions(wanted)
    longer = model.base_model.embeddings.position_embeddings.weight
    assert longer.shape == (wanted + 2, 36)
    assert model.config.max_position_embeddings == wanted
    assert longer.requires_grad
    for row in range(wanted + 2):
        torch.testing.assert_close(longer[row].detach(), table[row if row < 26 else 2 + (row - 2) % 24], rtol=0, atol=0)
    words = ids(1, wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(ids(2, 24))[0], before, rtol=0, atol=0)
        long_text = model(words)[0]
        with pytest.raises(ValueError, match=rf"^input_ids: {wanted + 1} tokens are more"):
            model(ids(1, wanted + 1))
    model.save_pretrained(tmp_path)
    assert read(getattr(ours, head), tmp_path).config.max_position_embeddings == wanted
    with torch.no_grad():
        close(read(getattr(ours, head), tmp_path)(words)[0], long_text)
        close(read(getattr(stock_heads, head), tmp_path)(words)[0], long_text)
    model(words)[0].sum().backward()
    assert longer.grad[-1].any()


def test_the_position_table_is_not_shortened() -> None:
    model = lively("YosoModel")
    with pytest.raises(ValueError, match=r"^max_position_embeddings: need an integer at least 24, got 23"):
        model.extend_positions(23)
    with pytest.raises(TypeError, match=r"^max_position_embeddings: need an integer, got float"):
        model.extend_positions(48.0)
    same_as_before = model.embeddings.position_embeddings.weight.clone()
    model.extend_positions(24)
    torch.testing.assert_close(model.embeddings.position_embeddings.weight, same_as_before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_longer_table_keeps_its_dtype_and_whether_it_learns(dtype: torch.dtype) -> None:
    model = lively("YosoModel").to(dtype)
    model.embeddings.position_embeddings.requires_grad_(False)
    model.extend_positions(30)
    assert model.embeddings.position_embeddings.weight.dtype == dtype
    assert not model.embeddings.position_embeddings.weight.requires_grad


# Read into other settings and dtypes


@pytest.mark.parametrize("way", WAYS)
@every_kind_of_file
def test_evaluation_hashes_are_right_after_reading(write: Any, way: str, tmp_path: Path) -> None:
    """They are no part of the file and follow from the config alone."""
    model = lively("YosoForMaskedLM", hash_seed=3, **WAYS[way])
    write(model, tmp_path)
    torch.manual_seed(99)
    same(read(YosoForMaskedLM, tmp_path), model, ids(2, 9), 0)


def test_settings_can_be_given_while_reading(tmp_path: Path) -> None:
    model = lively("YosoForMaskedLM")
    model.save_pretrained(tmp_path)
    changes = {"use_expectation": False, "num_hash": 5, "hash_code_len": 3, "hash_seed": 9, "grad": "exact", "use_fast_hash": False}
    read_with_changes = read(YosoForMaskedLM, tmp_path, **changes)
    for name, value in changes.items():
        assert getattr(read_with_changes.config, name) == value
        setattr(model.config, name, value)
    same(read_with_changes, model, ids(2, 9), 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"], ids=str)
def test_models_can_be_read_in_another_dtype(dtype: Any, way: str, tmp_path: Path) -> None:
    model = lively("YosoForMaskedLM", conv_window=3, **WAYS[way]).to(torch.bfloat16 if dtype == "auto" else torch.float32)
    model.save_pretrained(tmp_path)
    got = read(YosoForMaskedLM, tmp_path, dtype=dtype)
    wanted = torch.bfloat16 if dtype == "auto" else dtype
    assert {x.dtype for x in got.parameters()} == {wanted}
    with torch.no_grad():
        same(got, copy.deepcopy(model).to(wanted), ids(2, 9), 0)
        if way == "expectation":
            close(got(ids(2, 9)).logits.float(), model.float()(ids(2, 9)).logits, 0.1)


# The config


def test_every_field_of_transformers_has_its_default() -> None:
    theirs, mine = transformers.YosoConfig(), YosoConfig()
    assert {name: value for name, value in mine.to_dict().items() if name not in OWN} == theirs.to_dict()
    assert mine.model_type == theirs.model_type
    assert mine.attribute_map == theirs.attribute_map
    assert [getattr(mine, name) for name in OWN] == ["lower_bound", None, 0, "chained", None, 0, None]


@pytest.mark.parametrize("name", ["YosoConfig", *SHARED, "YosoForPreTraining"])
def test_the_package_offers_the_model(name: str) -> None:
    assert getattr(yoso_core, name) is getattr(ours, name)
    assert name in yoso_core.__all__
    assert name in ours.__all__


CHANGED: dict[str, Any] = TINY | {
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0,
    "type_vocab_size": 3,
    "initializer_range": 0.03,
    "layer_norm_eps": 1e-6,
    "use_expectation": False,
    "conv_window": 7,
    "use_fast_hash": False,
    "lsh_backward": False,
    "pad_token_id": 4,
    "bos_token_id": None,
    "eos_token_id": [2, 3],
    "tie_word_embeddings": False,
    "grad": "exact",
    "kernel_variant": "cpu:fused",
    "hash_seed": 2**63 - 1,
    "hash_layout": "chained",
    "rotations": 70,
    "num_labels": 5,
    "problem_type": "regression",
    "chunk_size_feed_forward": 3,
}


@pytest.mark.parametrize("changes", [{}, CHANGED], ids=["defaults", "changed"])
def test_a_config_goes_through_a_file(changes: dict[str, Any], tmp_path: Path) -> None:
    before = YosoConfig(**changes)
    assert {name: getattr(before, name) for name in changes} == changes
    before.save_pretrained(tmp_path)
    after = YosoConfig.from_pretrained(tmp_path)
    assert after.to_dict() == before.to_dict()
    assert {name: getattr(after, name) for name in changes} == changes
    assert YosoConfig.from_dict(before.to_dict()).to_dict() == before.to_dict()
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["model_type"] == "yoso"


def test_configs_go_both_ways(tmp_path: Path) -> None:
    """Transformers keeps the settings that it does not know."""
    before = YosoConfig(**CHANGED)
    before.save_pretrained(tmp_path)
    theirs = transformers.YosoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    after = YosoConfig.from_pretrained(tmp_path / "theirs")
    assert after.to_dict() == before.to_dict()
    transformers.YosoConfig().save_pretrained(tmp_path / "defaults")
    assert YosoConfig.from_pretrained(tmp_path / "defaults").to_dict() == YosoConfig().to_dict()


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "even_conv": ({"conv_window": 4}, r"conv_window: need an odd width, so that it has a middle, got 4"),
    "no_conv": ({"conv_window": 0}, r"conv_window: need an integer at least 1, got 0"),
    "conv_float": ({"conv_window": 3.0}, r"conv_window: .*3\.0"),
    "tau_zero": ({"hash_code_len": 0}, r"hash_code_len: need an integer between 1 and 30, got 0"),
    "tau_large": ({"hash_code_len": 31}, r"hash_code_len: need an integer between 1 and 30, got 31"),
    "tau_float": ({"hash_code_len": 4.5}, r"hash_code_len: .*4\.5"),
    "tau_bool": ({"hash_code_len": True}, r"hash_code_len: .*True"),
    "no_hash": ({"num_hash": 0}, r"num_hash: need an integer at least 1, got 0"),
    "hash_text": ({"num_hash": "8"}, r"num_hash: .*'8'"),
    "grad": ({"grad": "true"}, r"grad: need one of 'lower_bound', 'exact', got 'true'"),
    "variant": ({"kernel_variant": "cpu:none"}, r"kernel_variant: need one of .*'cpu:\w+'.*, got 'cpu:none'"),
    "seed_negative": ({"hash_seed": -1}, r"hash_seed: need an integer between 0 and 9223372036854775807, got -1"),
    "seed_large": ({"hash_seed": 2**63}, r"hash_seed: need an integer between 0 and 9223372036854775807, got 9223372036854775808"),
    "seed_float": ({"hash_seed": 1.5}, r"hash_seed: .*1\.5"),
    "dropout": ({"hidden_dropout_prob": 1.5}, r"hidden_dropout_prob: need a probability, 0 to 1, got 1\.5"),
    "dropout_negative": ({"attention_probs_dropout_prob": -0.1}, r"attention_probs_dropout_prob: need a probability, 0 to 1, got -0\.1"),
    **{
        name: ({name: 0}, rf"{name}: need an integer at least 1, got 0")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        )
    },
    "expectation_text": ({"use_expectation": "yes"}, r"use_expectation: need True or False, got 'yes'"),
    "fast_hash_number": ({"use_fast_hash": 2}, r"use_fast_hash: need True or False, got 2"),
    "lsh_backward_none": ({"lsh_backward": None}, r"lsh_backward: need True or False, got None"),
    "activation": ({"hidden_act": "no_such"}, r"hidden_act: need one of .*'gelu'.*, got 'no_such'"),
    "padding_negative": ({"pad_token_id": -1}, r"pad_token_id: need an integer at least 0, got -1"),
    "eps": ({"layer_norm_eps": -1.0}, r"layer_norm_eps: need a number of at least 0, got -1\.0"),
    "initializer_range": ({"initializer_range": "0.02"}, r"initializer_range: need a number, got '0\.02'"),
    "dropout_text": ({"hidden_dropout_prob": "none"}, r"hidden_dropout_prob: need a number, got 'none'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_setting_is_named(case: str, tmp_path: Path) -> None:
    """At once, and from a file as well."""
    changes, message = ERRORS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        config(**changes)
    (tmp_path / "config.json").write_text(json.dumps(config().to_dict() | changes))
    with pytest.raises((ValueError, TypeError), match=message):
        YosoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hash": 0}, r"num_hash: need an integer at least 1, got 0"),
        ({"hash_code_len": 31}, r"hash_code_len: need an integer between 1 and 30, got 31"),
        ({"grad": "none"}, r"grad: need one of 'lower_bound', 'exact', got 'none'"),
        ({"kernel_variant": "cpu:none"}, r"cpu:none"),
    ],
    ids=["num_hash", "hash_code_len", "grad", "kernel_variant"],
)
def test_a_setting_changed_to_nonsense_is_refused_by_the_next_call(changes: dict[str, Any], message: str) -> None:
    model = lively("YosoModel", use_expectation=False)
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises((ValueError, TypeError), match=message):
        model(ids(1, 5))
