"""``yoso fill-mask``: the numbers are those of a softmax, and what is wrong is said in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_support import checkpoint, tiny, write_bpe, write_checkpoint  # noqa: F401
from transformers import BertConfig, pipeline
from typer.testing import CliRunner

from yoso_core.cli import app
from yoso_core.model import YosoForMaskedLM
from yoso_core.model.filling import fill_mask, load_masked_lm
from yoso_core.model.tokenizer import load_tokenizer

ONE = "Paris is the [MASK] of France."


def yoso(*args: object) -> Any:
    return CliRunner().invoke(app, ["fill-mask", *(str(arg) for arg in args)], prog_name="yoso")


def masks(*args: object) -> list[list[dict[str, Any]]]:
    result = yoso(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["masks"]


def direct(folder: Path, text: str, place: int, **settings: Any) -> torch.Tensor:
    """Probabilities of the mask that is the ``place``-th of the text, from the model itself."""
    model, tokenizer = YosoForMaskedLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    for name, value in settings.items():
        setattr(model.config, name, value)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0]
    return logits[(ids[0] == tokenizer.mask_token_id).nonzero()[place, 0]].softmax(-1)


def check(found: list[dict[str, Any]], probabilities: torch.Tensor) -> None:
    assert [row["token"] for row in found] == probabilities.topk(len(found)).indices.tolist()
    assert [row["score"] for row in found] == pytest.approx(probabilities.topk(len(found)).values.tolist(), rel=1e-5)


def test_an_offloaded_model_fills_masks(checkpoint: Path) -> None:  # noqa: F811
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, tokenizer = load_masked_lm(checkpoint), load_tokenizer(checkpoint)
    expected = fill_mask(model, tokenizer, ONE)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.device.type == "meta"
    assert fill_mask(model, tokenizer, ONE) == expected


@pytest.mark.parametrize("mask", ["[MASK]", "<mask>"])
def test_the_scores_are_a_softmax(mask: str, checkpoint: Path) -> None:  # noqa: F811
    (found,) = masks(ONE.replace("[MASK]", mask), "--model", checkpoint, "--top", 4)
    assert len(found) == 4
    check(found, direct(checkpoint, ONE.replace("[MASK]", "<mask>"), 0))


def test_sampled_with_its_seed(checkpoint: Path) -> None:  # noqa: F811
    options = ("--model", checkpoint, "--sampled", "--num-hash", 3, "--hash-code-len", 2)
    probabilities = direct(checkpoint, ONE.replace("[MASK]", "<mask>"), 0, use_expectation=False, num_hash=3, hash_code_len=2, hash_seed=7)
    (found,) = masks(ONE, *options, "--seed", 7)
    check(found, probabilities)
    assert masks(ONE, *options, "--seed", 7) == [found]
    (other,) = masks(ONE, *options, "--seed", 8)
    assert [row["score"] for row in other] != [row["score"] for row in found]
    expected = direct(checkpoint, ONE.replace("[MASK]", "<mask>"), 0)
    assert (probabilities - expected).abs().max() > 1e-3


def test_the_settings_are_said(checkpoint: Path) -> None:  # noqa: F811
    report = json.loads(yoso(ONE, "--model", checkpoint, "--sampled", "--num-hash", 3, "--json").stdout)
    assert {name: report[name] for name in ("text", "attention", "num_hash", "hash_code_len", "hash_seed")} == {
        "text": ONE,
        "attention": "sampled",
        "num_hash": 3,
        "hash_code_len": 4,
        "hash_seed": 0,
    }
    assert "num_hash" not in json.loads(yoso(ONE, "--model", checkpoint, "--json").stdout)


def test_several_masks_are_filled_one_by_one(checkpoint: Path) -> None:  # noqa: F811
    text = "[MASK] is the <mask> of (<mask>)."
    found = masks(text, "--model", checkpoint, "--top", 2)
    assert len(found) == 3
    for place, rows in enumerate(found):
        check(rows, direct(checkpoint, text.replace("[MASK]", "<mask>"), place))
    first, second, third = (rows[0] for rows in found)
    assert first["sequence"] == f"{first['token_str']} is the <mask> of (<mask>)."
    assert second["sequence"] == f"<mask> is the{second['token_str']} of (<mask>)."
    assert third["sequence"] == f"<mask> is the <mask> of ({third['token_str']})."


def test_as_transformers_pipeline(checkpoint: Path) -> None:  # noqa: F811
    """One mask: the same numbers and texts, as in the model card of uw-madison/yoso-4096."""
    model, tokenizer = load_masked_lm(checkpoint), load_tokenizer(checkpoint)
    unmask = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    text = ONE.replace("[MASK]", "<mask>")
    ours = [vars(filling) for filling in fill_mask(model, tokenizer, text)[0]]
    theirs = unmask(text)
    assert [row.pop("score") for row in ours] == pytest.approx([row.pop("score") for row in theirs], rel=1e-5)
    assert ours == theirs


def test_more_than_the_vocabulary(checkpoint: Path) -> None:  # noqa: F811
    (found,) = masks(ONE, "--model", checkpoint, "--top", 10_000)
    assert sum(row["score"] for row in found) == pytest.approx(1, abs=1e-4)


def test_the_table(checkpoint: Path) -> None:  # noqa: F811
    result = yoso("A [MASK] and a [MASK].", "--model", checkpoint, "--top", 3)
    assert result.exit_code == 0
    assert all(word in result.output for word in ("score", "token", "token_str", "sequence", "attention expectation"))
    assert sum(line.startswith("│") for line in result.output.splitlines()) == 6
    (found, _) = masks("A [MASK] and a [MASK].", "--model", checkpoint, "--top", 3)
    assert f"{found[0]['score']:.4f}" in result.output


def error(*args: object) -> str:
    result = yoso(*args)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["Paris is it."], "TEXT: need [MASK] (or <mask>) in place of a word, got 'Paris is it.'"),
        (["[MASK]" + " of" * 60], "TEXT: need at most 40 tokens, one for each position of the model, got 63"),
        ([ONE, "--top", "0"], "--top: need an integer at least 1, got 0"),
        ([ONE, "--num-hash", "8"], "--num-hash: the expectation has no hashes; add --sampled"),
        ([ONE, "--seed", "8"], "--seed: the expectation has no hashes; add --sampled"),
        ([ONE, "--sampled", "--num-hash", "0"], "--num-hash: need an integer at least 1, got 0"),
        ([ONE, "--sampled", "--seed", "-1"], "--seed: need an integer at least 0, got -1"),
        ([ONE, "--hash-code-len", "31"], "--hash-code-len: need an integer between 1 and 30, got 31"),
    ],
    ids=["no mask", "too long", "top", "hashes", "seed", "no hashes", "negative seed", "code"],
)
def test_wrong_input_is_one_line(args: list[str], message: str, checkpoint: Path) -> None:  # noqa: F811
    assert error(*args, "--model", checkpoint) == f"yoso fill-mask: {message}\n"


def test_what_is_no_model(tmp_path: Path) -> None:
    assert "--model: there is no folder /no/such/folder" in error(ONE, "--model", "/no/such/folder")
    assert "there is no config.json" in error(ONE, "--model", tmp_path)
    BertConfig().save_pretrained(tmp_path)
    assert "--model: need a YOSO" in error(ONE, "--model", tmp_path)


def test_a_model_that_predicts_no_words(tmp_path: Path) -> None:
    message = error(ONE, "--model", write_checkpoint(tmp_path, "YosoForTokenClassification"))
    assert "lacks cls.predictions" in message


def test_a_model_without_weights(tmp_path: Path) -> None:
    tiny("YosoForMaskedLM").config.save_pretrained(tmp_path)
    assert "model.safetensors" in error(ONE, "--model", tmp_path)


def test_a_model_without_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path)
    assert "--model: no tokenizer in" in error(ONE, "--model", tmp_path)


def test_vocabulary_and_merges_alone(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    """The files that become all-unknown in AutoTokenizer give the same answers as the whole
    tokenizer.
    """
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path)
    write_bpe(tmp_path)
    assert masks(ONE, "--model", tmp_path) == masks(ONE, "--model", checkpoint)


def test_a_tokenizer_without_a_mask(checkpoint: Path) -> None:  # noqa: F811
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="tokenizer: it has no mask token"):
        fill_mask(load_masked_lm(checkpoint), tokenizer, ONE)
