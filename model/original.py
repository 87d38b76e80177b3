"""Checkpoints of the authors' own code, mlpen/YOSO, as models of this library.

The names and their meaning are facts of that repository (github.com/mlpen/YOSO), and of
mlpen/Nystromformer and mlpen/mra-attention by the same authors, which share its training code:

- Nystromformer ``code/utils.py``, `convert_weight_keys`: ``model.embeddings.*``,
  ``model.transformer_{i}.*``, ``model.pooler``, ``mlm.*``. The published YOSO was in this layout:
  transformers' convert_yoso_pytorch_to_pytorch.py renames these keys.
- YOSO ``encoders/backbones/efficient_attention.py`` and mra-attention
  ``RoBERTa/get_roberta_pretrained_weights.py``: ``model.backbone.backbone.encoders.{i}.*``, or
  ``encoder.*`` where the layers share one block, with ``ff.0`` and ``ff.2`` for the two matrices of
  the feed-forward network.
- YOSO ``encoders/backbones/efficient_attentions/yoso/yoso_v2/yoso.py``: ``mha.attn.conv.weight``,
  where there is a ``conv_window``.
- Nystromformer ``reorganized_code/BERT/model.py``: ``sen_class.*`` on ``tanh`` of ``model.pooler``,
  and a position table that begins with the first token (``BERT/dataset.py``); the table of
  ``RoBERT/model.py`` has two rows before it.
- ``BERT/run_pretrain.py``: a file is ``{"model_state_dict": ...}``, with the state of the optimizer
  beside it in a ``.cp`` file.
"""

import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from yoso_core import checks
from yoso_core.model.configuration import YosoConfig
from yoso_core.model.heads import YosoForMaskedLM, YosoForPreTraining, YosoModel, YosoPreTrainedModel
from yoso_core.model.layers import FIRST_POSITION

StateDict = dict[str, Tensor]

_BLOCK = re.compile(r"model\.(?:transformer_(?P<first>\d+)|backbone\.backbone\.(?:encoders\.(?P<second>\d+)|encoder))\.(?P<part>.+)")

_IN_A_BLOCK = {
    "mha.W_q": "attention.self.query",
    "mha.W_k": "attention.self.key",
    "mha.W_v": "attention.self.value",
    "mha.attn.conv": "attention.self.conv",
    "mha.ff": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "ff1": "intermediate.dense",
    "ff.0": "intermediate.dense",
    "ff2": "output.dense",
    "ff.2": "output.dense",
    "norm2": "output.LayerNorm",
}

_OUTSIDE = {
    "model.embeddings.word_embeddings": "yoso.embeddings.word_embeddings",
    "model.embeddings.position_embeddings": "yoso.embeddings.position_embeddings",
    "model.embeddings.token_type_embeddings": "yoso.embeddings.token_type_embeddings",
    "model.embeddings.norm": "yoso.embeddings.LayerNorm",
    "mlm.dense": "cls.predictions.transform.dense",
    "mlm.norm": "cls.predictions.transform.LayerNorm",
    "mlm.mlm_class": "cls.predictions.decoder",
    "model.pooler": "sop_classifier.dense",
    "sen_class": "sop_classifier.out_proj",
}

_WORDS = "yoso.embeddings.word_embeddings.weight"
_POSITIONS = "yoso.embeddings.position_embeddings.weight"
_DECODER = "cls.predictions.decoder.weight"
_ORDER = "sop_classifier.out_proj"

# nn.LayerNorm() and nn.GELU() of the authors' code.
_AUTHORS = {"layer_norm_eps": 1e-5, "hidden_act": "gelu"}


def convert_original_checkpoint(
    path: str | PathLike[str],
    config: YosoConfig | str | PathLike[str] | None = None,
    *,
    first_position: int | None = None,
    drop: Sequence[str] = (),
    **settings: Any,
) -> YosoPreTrainedModel:
    """A checkpoint that the authors' code wrote (mlpen/YOSO), as a model of this library, in
    float32 and in evaluation mode.

    Parameters
    ----------
    path : a file of `torch.save`: a state dict, or ``{"model_state_dict": ...}``, with or without
        the prefix ``module.`` of `DataParallel`. It is read with ``weights_only=True``, so a file
        cannot run code. The state of an optimizer beside the weights is ignored.
    config : a `YosoConfig`; or the path of a ``config.json``, the authors' or one of transformers.
        Sizes, number of layers and ``conv_window`` are read from the shapes in the file.
    first_position : the row of the first token in the position table of the file: 0 in the authors'
        ``BERT`` code, 2 in their ``RoBERTa`` code. ``None``: 0 with a sentence classifier
        (``sen_class``), which only the ``BERT`` code has, else 2.
    drop : keys to leave out on purpose, or the beginnings of keys up to a dot.
    settings : fields of `YosoConfig` that no shape shows, above all ``num_attention_heads``. What
        neither ``config`` nor ``settings`` says has the default of `YosoConfig`. But without
        ``config``, ``layer_norm_eps`` is 1e-5 and ``hidden_act`` is the exact GELU, as in the
        authors' code (their older code has the approximation by ``tanh``, ``"gelu_new"``).

    Returns
    -------
    `YosoForPreTraining` where the file has a sentence classifier, `YosoForMaskedLM` where it has a
    masked-LM head, else `YosoModel`. A warning names known parameters that are left out, and why.

    Raises
    ------
    FileNotFoundError : there is no such file.
    TypeError : `YosoConfig` has no field of that name.
    ValueError : the file has keys that a YOSO model has no place for (the message names all); a
        parameter is missing or has another shape; ``config`` contradicts the shapes; or nothing
        shows the number of heads.

    >>> from tempfile import NamedTemporaryFile
    >>> block = {"mha.W_q": (8, 8), "mha.W_k": (8, 8), "mha.W_v": (8, 8), "mha.ff": (8, 8)}
    >>> block |= {"ff1": (16, 8), "ff2": (8, 16), "norm1": (8,), "norm2": (8,)}
    >>> shapes = {f"transformer_0.{x}": block[x] for x in block} | {"embeddings.norm": (8,)}
    >>> state = {f"model.{name}.weight": torch.ones(shapes[name]) for name in shapes}
    >>> state |= {f"model.{name}.bias": torch.zeros(shapes[name][0]) for name in shapes}
    >>> for table, rows in {"word": 50, "position": 18, "token_type": 1}.items():
    ...     state[f"model.embeddings.{table}_embeddings.weight"] = torch.ones(rows, 8)
    >>> with NamedTemporaryFile() as file:
    ...     torch.save({"model_state_dict": state}, file.name)
    ...     model = convert_original_checkpoint(file.name, num_attention_heads=2)
    >>> type(model).__name__, model.config.max_position_embeddings
    ('YosoModel', 16)
    """
    unknown = sorted(settings.keys() - YosoConfig().to_dict().keys())
    if unknown:
        raise TypeError(f"{unknown[0]}: YosoConfig has no such field")
    found = _without_dropped(_state_dict(path), drop)
    weights: StateDict = {}
    foreign: list[str] = []
    layers: int | None = None
    if any("backbone.backbone.encoder." in key for key in found):
        layers = _number_of_shared_layers(config, settings)
    for key, tensor in found.items():
        names = _names(key, layers)
        if names:
            weights |= dict.fromkeys(names, tensor)
        else:
            foreign.append(key)
    if foreign:
        raise ValueError(f"path: {path} has parameters that a YOSO model has no place for: {', '.join(foreign)}; leave them out with drop=")
    if _WORDS not in weights:
        raise ValueError(f"path: need a checkpoint of the authors' YOSO, {path} has no model.embeddings.word_embeddings.weight")
    _without_a_place(weights)
    kind = _kind(weights)
    if first_position is None:
        first_position = 0 if kind is YosoForPreTraining else FIRST_POSITION
    _move_positions(weights, first_position)
    wanted = _config(weights, config, settings)
    model = kind(wanted)
    _load(model, weights, path)
    return model.eval()


def _state_dict(path: str | PathLike[str]) -> StateDict:
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"path: {path} cannot be read as weights ({reason}); for a .cp file, which also holds the state of training, take the .model "
            "file beside it"
        ) from error
    if isinstance(stored, Mapping) and "model_state_dict" in stored:
        stored = stored["model_state_dict"]
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise ValueError(f"path: need a state dict, or one under 'model_state_dict', {path} holds {_summary(stored)}")
    prefix = "module." if all(key.startswith("module.") for key in stored) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in stored.items()}


def _summary(stored: object) -> str:
    if isinstance(stored, Mapping):
        return f"a {type(stored).__name__} with {', '.join(map(repr, list(stored)[:5])) or 'nothing in it'}"
    return f"a {type(stored).__name__}"


def _without_dropped(found: StateDict, drop: Sequence[str]) -> StateDict:
    for start in drop:
        if not any(key == start or key.startswith(f"{start}.") for key in found):
            raise ValueError(f"drop: the file has no key {start!r}, and none that begins with {start + '.'!r}")
    return {key: tensor for key, tensor in found.items() if not any(key == start or key.startswith(f"{start}.") for start in drop)}


def _names(key: str, layers: int | None) -> list[str]:
    """The names that a parameter has here: one; one for each layer where the layers share a block;
    none where it has no place.
    """
    stem, _, kind = key.rpartition(".")
    if kind not in ("weight", "bias"):
        return []
    if stem in _OUTSIDE:
        return [f"{_OUTSIDE[stem]}.{kind}"]
    block = _BLOCK.fullmatch(stem)
    if block is None or block["part"] not in _IN_A_BLOCK:
        return []
    number = block["first"] or block["second"]
    numbers = [int(number)] if number else range(layers or 0)
    return [f"yoso.encoder.layer.{i}.{_IN_A_BLOCK[block['part']]}.{kind}" for i in numbers]


def _number_of_shared_layers(config: YosoConfig | str | PathLike[str] | None, settings: Mapping[str, Any]) -> int:
    given = settings.get("num_hidden_layers")
    if given is None and isinstance(config, YosoConfig):
        given = config.num_hidden_layers
    elif given is None and config is not None:
        given = _settings_of_file(config).get("num_hidden_layers")
    if given is None:
        raise ValueError("num_hidden_layers: the layers of this file share one block, so it does not show how many there are; give it")
    return checks.integer("num_hidden_layers", given, 1)


def _without_a_place(weights: StateDict) -> None:
    """Take out known parameters that no model here has, with a warning."""
    if any(name.startswith("sop_classifier.dense") for name in weights) and f"{_ORDER}.weight" not in weights:
        for kind in ("weight", "bias"):
            weights.pop(f"sop_classifier.dense.{kind}", None)
        warnings.warn("model.pooler is left out: there is no sentence classifier (sen_class) that would use it", stacklevel=3)
    classes = len(weights.get(f"{_ORDER}.weight", ()))
    if classes > 2:
        for kind in ("weight", "bias"):
            if f"{_ORDER}.{kind}" in weights:
                weights[f"{_ORDER}.{kind}"] = weights[f"{_ORDER}.{kind}"][:2]
        warnings.warn(f"sen_class has {classes} classes: those of the sentence order, 0 and 1, are kept, the others left out", stacklevel=3)


def _kind(weights: StateDict) -> type[YosoPreTrainedModel]:
    if f"{_ORDER}.weight" in weights:
        return YosoForPreTraining
    return YosoForMaskedLM if any(name.startswith("cls.") for name in weights) else YosoModel


def _move_positions(weights: StateDict, first_position: int) -> None:
    """Move the row of the first token to row 2. Rows before it that the authors' table lacks become
    zeros; nothing reads them.
    """
    checks.integer("first_position", first_position, 0, FIRST_POSITION)
    table = weights.get(_POSITIONS)
    if table is not None:
        weights[_POSITIONS] = torch.cat([table.new_zeros(FIRST_POSITION - first_position, table.shape[-1]), table])


def _config(weights: StateDict, config: YosoConfig | str | PathLike[str] | None, settings: dict[str, Any]) -> YosoConfig:
    seen = _seen(weights)
    if isinstance(config, YosoConfig):
        given: dict[str, Any] = config.to_dict() | settings
    else:
        given = _AUTHORS | ({} if config is None else _settings_of_file(config)) | settings
    for name, value in seen.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name}: {given[name]} was given, but the shapes of the file say {value}")
    if "num_attention_heads" not in given | seen:
        raise ValueError("num_attention_heads: the shapes of this file do not show it; give it, or config=")
    return YosoConfig(**given | seen)


def _seen(weights: StateDict) -> dict[str, Any]:
    """The fields of the configuration that the shapes show."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(f"path: the parameter that becomes {name} is missing")
        return tuple(weights[name].shape)

    layers = {int(match[1]) for name in weights if (match := re.match(r"yoso\.encoder\.layer\.(\d+)\.", name))}
    if not layers:
        raise ValueError("path: the file has no layers (model.transformer_0, or model.backbone.backbone.encoders.0)")
    vocabulary, hidden = shape(_WORDS)
    seen: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": max(layers) + 1,
        "intermediate_size": shape("yoso.encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": shape(_POSITIONS)[0] - FIRST_POSITION,
        "type_vocab_size": shape("yoso.embeddings.token_type_embeddings.weight")[0],
        "conv_window": None,
        "tie_word_embeddings": _DECODER not in weights or torch.equal(weights[_DECODER], weights[_WORDS]),
    }
    conv = weights.get("yoso.encoder.layer.0.attention.self.conv.weight")
    if conv is not None:
        seen["num_attention_heads"], _, seen["conv_window"], _ = conv.shape
    return seen


def _settings_of_file(path: str | PathLike[str]) -> dict[str, Any]:
    """Fields of `YosoConfig` from its own JSON, or from the section ``model`` of the authors'
    ``config.json``.
    """
    try:
        stored = json.loads(Path(path).read_text("utf-8"))
        if stored.get("model_type") == "yoso":
            return cast(dict[str, Any], stored)
        model = stored["model"]
        kind = model["attn_type"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"config: need a config.json of the authors (with 'model' and its 'attn_type') or of transformers, got {path} ({error!r})"
        ) from error
    if not kind.startswith("yoso"):
        raise ValueError(f"config: need a model with YOSO attention, {path} has attention {kind!r}")
    names = {
        "num_head": "num_attention_heads",
        "num_layers": "num_hidden_layers",
        "dropout_prob": "hidden_dropout_prob",
        "hash_code_len": "hash_code_len",
        "hashcode_len": "hash_code_len",
        "num_hash": "num_hash",
        "num_hash_f": "num_hash",
        "use_fast_hash": "use_fast_hash",
    }
    fields = {ours: model[theirs] for theirs, ours in names.items() if theirs in model}
    # A negative number of hashes means the expectation.
    fields["use_expectation"] = kind == "yoso-v1-e" or fields.get("num_hash", 1) < 0
    if fields["use_expectation"]:
        fields.pop("num_hash", None)
    if "n2_backward" in model:
        fields["lsh_backward"] = not model["n2_backward"]
    return fields


def _load(model: YosoPreTrainedModel, weights: StateDict, path: str | PathLike[str]) -> None:
    """Load ``weights`` into the model. Every parameter of the model must be in ``weights``, and
    every one of ``weights`` must be in the model.
    """
    if isinstance(model, YosoModel):
        weights = {name.removeprefix("yoso."): tensor for name, tensor in weights.items()}
    else:
        if "cls.predictions.decoder.bias" in weights:
            weights["cls.predictions.bias"] = weights["cls.predictions.decoder.bias"]
        weights.setdefault(_DECODER, weights[_WORDS])
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise ValueError(f"path: {path} lacks the parameters that become {', '.join(missing)}")
    surplus = sorted(weights.keys() - wanted.keys())
    if surplus:
        raise ValueError(f"path: {path} has parameters that a model of this configuration has no place for: {', '.join(surplus)}")
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"path: the parameter that becomes {name} has the shape {tuple(weights[name].shape)}, need {shape}")
    model.load_state_dict(weights)
