"""The tokenizer of a YOSO checkpoint: RoBERTa's, whatever files it comes in."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_support import SIZE, TEXTS, in_new_process, write_bpe, write_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, AlbertTokenizer, AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from yoso_core.model.tokenizer import load_tokenizer

MASKED = "Paris is the <mask> of France."
PIECES = ["Paris", "Ġis", "Ġthe", " <mask>", "Ġof", "ĠFrance", "."]
"""The mask stands for a word with the space before it."""


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOSO checkpoint's folder with vocab.json and merges.txt."""
    return write_config(write_bpe(tmp_path_factory.mktemp("bpe")))


def json_file(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def test_what_autotokenizer_does_with_vocabulary_and_merges(bpe: Path) -> None:
    """Why this module is there: transformers 5.23 takes AlbertTokenizer for a YOSO, and every word
    is unknown, without an error.
    """
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    assert isinstance(tokenizer, AlbertTokenizer)
    assert set(tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]) == {tokenizer.unk_token_id}


def test_what_robertas_tokenizer_does_with_a_mask(bpe: Path) -> None:
    """And its RobertaTokenizer, from the same files, makes a token of the space before a mask,
    which no text has.
    """
    assert "Ġ" in RobertaTokenizer.from_pretrained(bpe).tokenize(MASKED)


def vocabulary_and_merges(folder: Path, bpe: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(bpe / name, folder)


def with_a_map_of_special_tokens(folder: Path, bpe: Path) -> None:
    vocabulary_and_merges(folder, bpe)
    mask = {"content": "<mask>", "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    json_file(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "mask_token": mask})


def with_the_class_named(folder: Path, bpe: Path) -> None:
    vocabulary_and_merges(folder, bpe)
    json_file(folder / "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer", "mask_token": "<mask>", "model_max_length": 512})


def with_a_config_that_names_none(folder: Path, bpe: Path) -> None:
    vocabulary_and_merges(folder, bpe)
    json_file(folder / "tokenizer_config.json", {"model_max_length": 512})


def saved(folder: Path, bpe: Path) -> None:
    load_tokenizer(bpe).save_pretrained(folder)


def saved_by_transformers(folder: Path, bpe: Path) -> None:
    RobertaTokenizer.from_pretrained(bpe).save_pretrained(folder)


def tokenizer_json_alone(folder: Path, bpe: Path) -> None:
    saved(folder, bpe)
    (folder / "tokenizer_config.json").unlink()


LAYOUTS = (
    vocabulary_and_merges,
    with_a_map_of_special_tokens,
    with_the_class_named,
    with_a_config_that_names_none,
    saved,
    saved_by_transformers,
    tokenizer_json_alone,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_robertas_tokenizer(layout: Any, bpe: Path, tmp_path: Path) -> None:
    layout(tmp_path, bpe)
    write_config(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, RobertaTokenizer)
    assert tokenizer.tokenize(MASKED) == PIECES
    ids = tokenizer(MASKED)["input_ids"]
    vocabulary = json.loads((bpe / "vocab.json").read_text("utf-8"))
    assert ids == [0, *(vocabulary["<mask>" if piece == " <mask>" else piece] for piece in PIECES), 2]
    assert tokenizer.decode(tokenizer(TEXTS[1])["input_ids"], skip_special_tokens=True) == TEXTS[1]
    assert tokenizer.model_max_length == SIZE["max_position_embeddings"]
    assert tokenizer.padding_side == "right"


def test_saved_it_is_right_for_autotokenizer_as_well(bpe: Path, tmp_path: Path) -> None:
    saved(tmp_path, bpe)
    write_config(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, RobertaTokenizer)
    assert tokenizer.tokenize(MASKED) == PIECES


def test_arguments_of_from_pretrained(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe, model_max_length=11, padding_side="left")
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (11, "left")


def test_a_mask_of_another_name(bpe: Path, tmp_path: Path) -> None:
    vocabulary_and_merges(tmp_path, bpe)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    vocabulary["[GAP]"] = vocabulary.pop("<mask>")
    json_file(tmp_path / "vocab.json", vocabulary)
    tokenizer = load_tokenizer(tmp_path, mask_token=AddedToken("[GAP]", lstrip=False))
    assert tokenizer.tokenize("Paris is the [GAP] of") == ["Paris", "Ġis", "Ġthe", " [GAP]", "Ġof"]
    assert len(tokenizer) == len(vocabulary)


def test_a_unigram_is_alberts(tmp_path: Path) -> None:
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[MASK]", 0.0), ("▁paris", -1.0), ("▁is", -2.0)]
    AlbertTokenizer(vocab=pieces).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    write_config(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, AlbertTokenizer)
    assert tokenizer.tokenize("Paris is") == ["▁paris", "▁is"]


@pytest.mark.parametrize("kind", ["words", "pieces that are not bytes"])
def test_another_tokenizer_json_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    if kind == "words":
        whole = Tokenizer(models.WordLevel({"Paris": 0, "is": 1, "?": 2}, unk_token="?"))
        whole.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        whole = Tokenizer(models.BPE({"▁": 0, "i": 1, "s": 2, "▁i": 3, "▁is": 4}, [("▁", "i"), ("▁i", "s")]))
        whole.pre_tokenizer, whole.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    whole.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer) is PreTrainedTokenizerFast
    assert tokenizer("is")["input_ids"] == ([1] if kind == "words" else [4])


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*: need tokenizer\.json, vocab\.json with merges\.txt, or"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_path_that_is_none(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"path_or_name: there is no folder {path}"):
        load_tokenizer(path)


def test_a_file_is_no_folder(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bpe)
    with pytest.raises(FileNotFoundError, match=r"path_or_name: there is no folder vocab\.json"):
        load_tokenizer("vocab.json")


def test_a_tokenizer_that_knows_no_word(bpe: Path, tmp_path: Path) -> None:
    """What AutoTokenizer made of the files above, saved."""
    AutoTokenizer.from_pretrained(bpe).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="every word would be unknown"):
        load_tokenizer(tmp_path)


def test_a_name_that_is_not_at_hand(tmp_path: Path) -> None:
    code = "from yoso_core.model.tokenizer import load_tokenizer\ntry:\n    load_tokenizer('uw-madison/none')\n"
    code += "except FileNotFoundError as error:\n    print(error)"
    assert "without a network only downloaded files are found" in in_new_process(code, tmp_path)
