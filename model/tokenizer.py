"""The tokenizer of a YOSO checkpoint.

YOSO models were trained with RoBERTa's byte-level BPE, but `AutoTokenizer` takes `AlbertTokenizer`
for ``model_type: yoso``. A folder with vocab.json and merges.txt, and with no class named in
tokenizer_config.json, then becomes a tokenizer of five tokens: every word is unknown, without an
error. `load_tokenizer` looks at the files that are there.
"""

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # exported in some releases alone
from transformers import AddedToken, AlbertTokenizer, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, RobertaTokenizer
from transformers.utils import cached_file

_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""The arguments of `from_pretrained` that say where a file is."""

HUB_SECONDS = 5.0
"""The hub has so long to answer."""

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""A name on the hub: ``model`` or ``owner/model``."""


def load_tokenizer(path_or_name: str | PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a name on the hub, chosen by the files that are there.

    - tokenizer_config.json names a class: that class.
    - vocab.json and merges.txt, or a tokenizer.json with byte-level BPE: RoBERTa's.
    - spiece.model, or a tokenizer.json with Unigram: ALBERT's.
    - another tokenizer.json: as it is.

    RoBERTa's mask token includes the space before it, as in training (``lstrip``). Loaded from
    vocab.json and merges.txt by `RobertaTokenizer` alone (transformers 5.23), the space would be a
    token of its own, which no text of the training has. ``model_max_length`` is that of the model,
    where there is a config.json of a YOSO; files copied from RoBERTa say 512.

    Parameters
    ----------
    kwargs : those of `from_pretrained`.

    Raises
    ------
    FileNotFoundError : there is no tokenizer.
    ValueError : the tokenizer knows no word. It was saved by a program that did not find its files.

    >>> from tempfile import TemporaryDirectory
    >>> words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "h", "i", "hi"]
    >>> vocabulary = {word: number for number, word in enumerate(words)}
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
    ...     _ = Path(folder, "merges.txt").write_text("h i")
    ...     load_tokenizer(folder)("hi<mask>")["input_ids"]
    [0, 7, 4, 2]
    """
    kwargs |= local_alone(path_or_name)
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    tokenizer = _by_files(path_or_name, where, kwargs)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"path_or_name: the tokenizer in {path_or_name} has special tokens alone, every word would be unknown")
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
            + ("" if Path(path_or_name).is_dir() else "; it is no folder here, and without a network only downloaded files are found")
        )
    return cast(PreTrainedTokenizerBase, kind.from_pretrained(path_or_name, **kwargs))


def _of_whole(whole: dict[str, Any]) -> type[PreTrainedTokenizerBase]:
    """The class for a tokenizer.json that is the only file."""
    model, decoder = ((whole.get(part) or {}).get("type") for part in ("model", "decoder"))
    if (model, decoder) == ("BPE", "ByteLevel"):
        return cast(type[PreTrainedTokenizerBase], RobertaTokenizer)
    return cast(type[PreTrainedTokenizerBase], AlbertTokenizer if model == "Unigram" else PreTrainedTokenizerFast)


def _mask_takes_the_space(tokenizer: RobertaTokenizer) -> None:
    mask = tokenizer.added_tokens_decoder.get(tokenizer.mask_token_id)
    if mask is not None and not mask.lstrip:
        wide = AddedToken(mask.content, lstrip=True, rstrip=mask.rstrip, single_word=mask.single_word, normalized=False, special=True)
        tokenizer.add_special_tokens({"mask_token": wide})


def local_alone(path_or_name: str | PathLike[str]) -> dict[str, Any]:
    """``local_files_only=True``, as arguments of `from_pretrained`, for a name where the hub does
    not answer. Otherwise each missing file is asked for again and again, for most of a minute.
    """
    if Path(path_or_name).is_dir():
        return {}
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # whatever the client of this release raises, in its offline mode too
        return {"local_files_only": True}
    return {}


def stored_file(path_or_name: str | PathLike[str], filename: str, **where: Any) -> Path | None:
    """The path of a file on this machine, downloaded from the hub where necessary. ``None`` if the
    folder or the repository has no such file.

    `FileNotFoundError` for what is no folder and cannot be a name on the hub.
    """
    local = Path(path_or_name)
    if not local.is_dir() and (local.exists() or not _NAME.fullmatch(str(path_or_name))):
        raise FileNotFoundError(f"path_or_name: there is no folder {path_or_name}")
    found = cached_file(path_or_name, filename, _raise_exceptions_for_missing_entries=False, **where)
    return None if found is None else Path(found)


def stored_json(path_or_name: str | PathLike[str], filename: str, **where: Any) -> dict[str, Any] | None:
    """The contents of a JSON file, ``None`` if there is no such file."""
    found = stored_file(path_or_name, filename, **where)
    return None if found is None else cast(dict[str, Any], json.loads(found.read_text("utf-8")))


class YosoTokenizer:
    """The class that `AutoTokenizer` finds for a `YosoConfig` after `register_auto_classes`. It has
    no objects; `from_pretrained` is `load_tokenizer`.
    """

    @classmethod
    def from_pretrained(cls, path_or_name: str | PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
        return load_tokenizer(path_or_name, **{name: value for name, value in kwargs.items() if not name.startswith("_")})
