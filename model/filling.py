"""Words for the masks of a text, with the score of each."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from yoso_core import checks
from yoso_core.model.heads import YosoForMaskedLM
from yoso_core.model.tokenizer import stored_json

MASK = "[MASK]"
"""How a mask may be written whatever the tokenizer calls it."""


@dataclass(frozen=True)
class Filling:
    """One proposal for one mask: its probability, the token, and the text with it, as in
    transformers' fill-mask pipeline.
    """

    score: float
    token: int
    token_str: str
    sequence: str


def load_masked_lm(path_or_name: str | PathLike[str]) -> YosoForMaskedLM:
    """`YosoForMaskedLM` of a folder or a name on the hub, in evaluation.

    Raises what `from_pretrained` passes over: `ValueError` for a model that is not a YOSO, or has
    no head that predicts words.
    """
    config = stored_json(path_or_name, "config.json")
    if config is None:
        why = "there is no config.json" if Path(path_or_name).is_dir() else "it is no folder here, and not on the hub or fetched before"
        raise FileNotFoundError(f"path_or_name: no model in {path_or_name}: {why}")
    if config.get("model_type") != "yoso":
        raise ValueError(f"path_or_name: need a YOSO, {path_or_name} is of type {config.get('model_type')!r}")
    model, report = YosoForMaskedLM.from_pretrained(path_or_name, output_loading_info=True)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"path_or_name: {path_or_name} has no masked-LM head or lacks a part of it: {', '.join(missing)}")
    return model.eval()


@torch.no_grad()
def fill_mask(model: YosoForMaskedLM, tokenizer: PreTrainedTokenizerBase, text: str, *, top: int = 5) -> list[list[Filling]]:
    """For every mask of ``text``, ``[MASK]`` or the tokenizer's own, the ``top`` likeliest tokens,
    by a softmax over the vocabulary.

    Several masks are filled one by one, each with the others left in place. The model decides
    whether attention is expected or sampled (``model.config.use_expectation``).
    """
    checks.integer("top", top, 1)
    mask = tokenizer.mask_token
    if mask is None:
        raise ValueError("tokenizer: it has no mask token")
    pieces = text.replace(MASK, mask).split(mask)
    if len(pieces) == 1:
        raise ValueError(f"text: need {MASK} (or {mask}) where a word is to be guessed, got {text!r}")
    ids = tokenizer(mask.join(pieces), verbose=False)["input_ids"]
    places = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    longest = model.config.max_position_embeddings
    if len(ids) > longest:
        raise ValueError(f"text: {len(ids)} tokens are too many, the model has positions for {longest}")
    logits = model(torch.tensor([ids], device=model.device)).logits[0, places]
    scores, tokens = logits.float().softmax(dim=-1).topk(min(top, logits.shape[-1]))
    # What stands before a mask in a text: its token may have taken a space with it.
    spaces = [" " * piece[-1:].isspace() for piece in pieces[:-1]]
    return [
        [
            Filling(score, token, tokenizer.decode([token]), _with_token(tokenizer, ids, places, place, token, spaces))
            for score, token in zip(scores[i].tolist(), tokens[i].tolist(), strict=True)
        ]
        for i, place in enumerate(places)
    ]


def _with_token(tokenizer: PreTrainedTokenizerBase, ids: list[int], places: list[int], place: int, token: int, spaces: list[str]) -> str:
    """The text with ``token`` at ``place`` and the other masks as they are."""
    filled = [token if i == place else word for i, word in enumerate(ids)]
    others = [(i, space) for i, space in zip(places, spaces, strict=True) if i != place]
    starts, ends = [0, *(i + 1 for i, _ in others)], [*(i for i, _ in others), len(ids)]
    parts = [tokenizer.decode(filled[start:end], skip_special_tokens=True) for start, end in zip(starts, ends, strict=True)]
    return parts[0] + "".join(f"{space}{tokenizer.mask_token}{part}" for (_, space), part in zip(others, parts[1:], strict=True))
