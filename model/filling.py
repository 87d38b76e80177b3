"""Fill the masks of a text with words, each with its score."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from yoso_core import checks
from yoso_core.model.heads import YosoForMaskedLM
from yoso_core.model.tokenizer import local_alone, stored_json

MASK = "[MASK]"
"""How a mask may be written, whatever the tokenizer calls it."""


@dataclass(frozen=True)
class Filling:
    """One proposal for one mask, as in transformers' fill-mask pipeline."""

    score: float
    """The probability of the token."""
    token: int
    token_str: str
    """The token as text."""
    sequence: str
    """The text with the token in place of the mask."""


def load_masked_lm(path_or_name: str | PathLike[str]) -> YosoForMaskedLM:
    """`YosoForMaskedLM` of a folder or a name on the hub, in evaluation mode.

    Raises
    ------
    FileNotFoundError : there is no model of that name.
    ValueError : the model is not a YOSO, or has no head that predicts words. `from_pretrained`
        alone would go on with random weights.

    >>> from tempfile import TemporaryDirectory
    >>> from yoso_core.model import YosoConfig
    >>> config = YosoConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> with TemporaryDirectory() as folder:
    ...     YosoForMaskedLM(config).save_pretrained(folder)
    ...     load_masked_lm(folder).training
    False
    """
    where = local_alone(path_or_name)
    config = stored_json(path_or_name, "config.json", **where)
    if config is None:
        why = (
            "there is no config.json"
            if Path(path_or_name).is_dir()
            else "it is no folder here, and neither on the hub nor downloaded before"
        )
        raise FileNotFoundError(f"path_or_name: no model in {path_or_name}: {why}")
    if config.get("model_type") != "yoso":
        raise ValueError(f"path_or_name: need a YOSO model, {path_or_name} is of type {config.get('model_type')!r}")
    model, report = YosoForMaskedLM.from_pretrained(path_or_name, output_loading_info=True, **where)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"path_or_name: need a model with a whole masked-LM head, {path_or_name} lacks {', '.join(missing)}")
    return model.eval()


@torch.no_grad()
def fill_mask(model: YosoForMaskedLM, tokenizer: PreTrainedTokenizerBase, text: str, *, top: int = 5) -> list[list[Filling]]:
    """The likeliest tokens for every mask of a text, by a softmax over the vocabulary.

    Parameters
    ----------
    model : attends as its config says (``model.config.use_expectation``).
    text : with at least one mask, written ``[MASK]`` or as the tokenizer writes it. Several masks
        are filled one by one, each with the others left in place.
    top : the number of tokens for each mask.

    Returns
    -------
    A list for each mask, the likeliest token first. ``ValueError`` where there is no mask, or where
    the text has more tokens than the model has positions.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> from yoso_core.model import YosoConfig
    >>> vocabulary = {"[UNK]": 0, "[PAD]": 1, "[MASK]": 2, "red": 3, "sky": 4}
    >>> words = Tokenizer(models.WordLevel(vocabulary))
    >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> model = YosoForMaskedLM(YosoConfig(vocab_size=5, **sizes)).eval()  # not trained
    >>> (fillings,) = fill_mask(model, tokenizer, "red [MASK] sky", top=2)
    >>> len(fillings), 0 < fillings[1].score <= fillings[0].score < 1
    (2, True)
    """
    checks.integer("top", top, 1)
    mask = tokenizer.mask_token
    if mask is None:
        raise ValueError("tokenizer: it has no mask token, need one")
    pieces = text.replace(MASK, mask).split(mask)
    if len(pieces) == 1:
        raise ValueError(f"text: need {MASK} (or {mask}) in place of a word, got {text!r}")
    ids = tokenizer(mask.join(pieces), verbose=False)["input_ids"]
    positions = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    longest = model.config.max_position_embeddings
    if len(ids) > longest:
        raise ValueError(f"text: need at most {longest} tokens, one for each position of the model, got {len(ids)}")
    # Weights that were offloaded are nowhere until they are used; the ids are brought to them.
    device = next((weight.device for weight in model.parameters() if not weight.is_meta), "cpu")
    logits = model(torch.tensor([ids], device=device)).logits[0, positions]
    scores, tokens = logits.float().softmax(dim=-1).topk(min(top, logits.shape[-1]))
    # The mask token may have taken the space before it.
    spaces = [" " * piece[-1:].isspace() for piece in pieces[:-1]]
    return [
        [
            Filling(score, token, tokenizer.decode([token]), _with_token(tokenizer, ids, positions, position, token, spaces))
            for score, token in zip(scores[i].tolist(), tokens[i].tolist(), strict=True)
        ]
        for i, position in enumerate(positions)
    ]


def _with_token(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], positions: list[int], position: int, token: int, spaces: list[str]
) -> str:
    """The text with ``token`` at ``position``. The masks at the other positions stay, each with the
    space before it.
    """
    filled = [token if i == position else word for i, word in enumerate(ids)]
    others = [(i, space) for i, space in zip(positions, spaces, strict=True) if i != position]
    starts, ends = [0, *(i + 1 for i, _ in others)], [*(i for i, _ in others), len(ids)]
    parts = [tokenizer.decode(filled[start:end], skip_special_tokens=True) for start, end in zip(starts, ends, strict=True)]
    return parts[0] + "".join(f"{space}{tokenizer.mask_token}{part}" for (_, space), part in zip(others, parts[1:], strict=True))
