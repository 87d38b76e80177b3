"""The tokenizer of a YOSO checkpoint.

YOSO models were trained with RoBERTa's byte-level BPE, but `AutoTokenizer` takes `AlbertTokenizer`
for ``model_type: yoso``: a folder with vocab.json and merges.txt and no class named in
tokenizer_config.json becomes a tokenizer of five tokens, which makes every word unknown without an
error. `load_tokenizer` goes by the files that are there.
"""

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any, cast

from transformers import AddedToken, AlbertTokenizer, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, RobertaTokenizer
from transformers.utils import cached_file

_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments that say where a file is, of all that `from_pretrained` takes."""

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""A name on the hub: ``model`` or ``owner/model``."""


def load_tokenizer(path_or_name: str | PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a name on the hub, by its files.

    - A class named in tokenizer_config.json: that one.
    - vocab.json and merges.txt, or a tokenizer.json with byte-level BPE: RoBERTa's.
    - spiece.model, or a tokenizer.json with Unigram: ALBERT's. Another tokenizer.json: as it
      stands.

    RoBERTa's mask token stands for a word with the space before it, as in training (``lstrip``);
    loaded from vocab.json and merges.txt by `RobertaTokenizer` alone (transformers 5.23), the space
    would be a token of its own, which no text has. ``model_max_length`` is the model's, where a
    YOSO config.json is there: files copied from RoBERTa say 512.

    ``kwargs`` are those of `from_pretrained`. Raises `FileNotFoundError` where there is no
    tokenizer, and `ValueError` where it knows no word (it was saved by a program that had not found
    its files).
    """
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    tokenizer = _by_files(path_or_name, where, kwargs)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"path_or_name: the tokenizer in {path_or_name} has special tokens and no other, every word would be unknown")
    if isinstance(tokenizer, RobertaTokenizer):
        _mask_takes_the_space(tokenizer)
    config = stored_json(path_or_name, "config.json", **where) or {}
    if config.get("model_type") == "yoso" and "model_max_length" not in kwargs:
        tokenizer.model_max_length = config.get("max_position_embeddings", 4096)
    return tokenizer


def _by_files(path_or_name: str | PathLike[str], where: dict[str, Any], kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    settings = stored_json(path_or_name, "tokenizer_config.json", **where) or {}
    if settings.get("tokenizer_class") or settings.get("auto_map"):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path_or_name, **kwargs))
    kind: type[PreTrainedTokenizerBase]
    whole = stored_json(path_or_name, "tokenizer.json", **where)
    if whole is not None:
        kind = _of_whole(whole)
    elif stored_file(path_or_name, "vocab.json", **where) and stored_file(path_or_name, "merges.txt", **where):
        kind = RobertaTokenizer
    elif stored_file(path_or_name, "spiece.model", **where):
        kind = AlbertTokenizer
    else:
        raise FileNotFoundError(
            f"path_or_name: no tokenizer in {path_or_name}: need tokenizer.json, vocab.json with merges.txt, or spiece.model"
            + ("" if Path(path_or_name).is_dir() else "; it is no folder here, and offline only what was fetched before is found")
        )
    return cast(PreTrainedTokenizerBase, kind.from_pretrained(path_or_name, **kwargs))


def _of_whole(whole: dict[str, Any]) -> type[PreTrainedTokenizerBase]:
    """Which class a tokenizer.json that stands alone is for."""
    model, decoder = ((whole.get(part) or {}).get("type") for part in ("model", "decoder"))
    if (model, decoder) == ("BPE", "ByteLevel"):
        return cast(type[PreTrainedTokenizerBase], RobertaTokenizer)
    return cast(type[PreTrainedTokenizerBase], AlbertTokenizer if model == "Unigram" else PreTrainedTokenizerFast)


def _mask_takes_the_space(tokenizer: RobertaTokenizer) -> None:
    mask = tokenizer.added_tokens_decoder.get(tokenizer.mask_token_id)
    if mask is not None and not mask.lstrip:
        wide = AddedToken(mask.content, lstrip=True, rstrip=mask.rstrip, single_word=mask.single_word, normalized=False, special=True)
        tokenizer.add_special_tokens({"mask_token": wide})


def stored_file(path_or_name: str | PathLike[str], filename: str, **where: Any) -> Path | None:
    """The file on this machine, fetched from the hub where it has to be; ``None`` if there is none
    in the folder or repository.

    What is neither a folder nor can be a name on the hub raises `FileNotFoundError`.
    """
    local = Path(path_or_name)
    if not local.is_dir() and (local.exists() or not _NAME.fullmatch(str(path_or_name))):
        raise FileNotFoundError(f"path_or_name: there is no folder {path_or_name}")
    found = cached_file(path_or_name, filename, _raise_exceptions_for_missing_entries=False, **where)
    return None if found is None else Path(found)


def stored_json(path_or_name: str | PathLike[str], filename: str, **where: Any) -> dict[str, Any] | None:
    """What the JSON file says, ``None`` if there is none."""
    found = stored_file(path_or_name, filename, **where)
    return None if found is None else cast(dict[str, Any], json.loads(found.read_text("utf-8")))


class YosoTokenizer:
    """What `AutoTokenizer` finds for a `YosoConfig` once `register_auto_classes` has run; makes no
    objects of its own.
    """

    @classmethod
    def from_pretrained(cls, path_or_name: str | PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
        return load_tokenizer(path_or_name, **{name: value for name, value in kwargs.items() if not name.startswith("_")})
