"""YOSO attention in other models: ``attn_implementation="yoso"`` for every model that calls
transformers' attention interface.

::

    enable_yoso_attention()
    model = AutoModel.from_pretrained("answerdotai/ModernBERT-base", attn_implementation="yoso")

What runs, and how it differs from softmax attention:

- Every global layer that attends in both directions computes `yoso_attention`: unit queries and
  keys, hashed or compared by angle, and an output row of length one. So ``scaling`` has no effect.
  A model that was trained with softmax must be trained further before it is of use.
- Padding is masked as keys: a row of a padded batch gets what it would get alone, up to rounding.
  Sampled in float32, a rounding can turn over a bit of a code, and the layers above spread it. The
  rows of padding themselves have no meaning.
- There are no probabilities to drop. The model's attention dropout has no effect in these layers,
  as in YOSO itself.
- In evaluation the hashes are a pure function of (seed, layer, head, shape). In training they are
  new in every call, from torch's generator.
- Local layers (ModernBERT's with ``sliding_window``) keep their softmax, their window and their
  dropout. They are computed as with ``attn_implementation="sdpa"``, at its cost, with a mask of
  ``n`` by ``n``. A part that never calls the interface (a pooling layer, say) keeps its attention.
- ``output_attentions=True`` returns the weights, before rows are scaled to length one: the expected
  ones, or where it is sampled the share of hashes that collide.
  Local layers return their own weights.

The folder of a saved model says that it attends with YOSO, and with which options. Loaded in a
process that has called `enable_yoso_attention`, it does so again. In another process transformers
refuses the name; ``attn_implementation="sdpa"`` loads the weights there. Adapters of peft are saved
without the model under them, so call `enable_yoso_attention` for that model again.

The encoder of an encoder-decoder whose decoder is causal (BART, Whisper) can attend with YOSO by
itself. It then has a config of its own, which is not saved with the whole::

    model = AutoModelForSpeechSeq2Seq.from_pretrained("openai/whisper-tiny")
    enable_yoso_attention(YosoAttentionOptions(num_hash=64), model=model.get_encoder())

What cannot be computed raises: causal attention, masks that differ from query to query, additive
masks and position biases, softcaps, sinks, packed sequences, paged caches. A model whose attention
never calls the interface raises when it is made; transformers alone would accept the name and
attend as before.
"""

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from yoso_core import checks
from yoso_core.model.attention import Backward, yoso_attention, yoso_attention_with_weights
from yoso_core.model.draws import evaluation_draw
from yoso_core.model.values import values_can_be_read
from yoso_core.reference.expectation import Grad
from yoso_core.reference.hashing import Layout
from yoso_core.registry import variants

NAME = "yoso"
"""The name to give as ``attn_implementation``."""


@dataclass(frozen=True)
class YosoAttentionOptions:
    """How ``attn_implementation="yoso"`` attends.

    Parameters
    ----------
    num_hash : ``m``, the number of hashes.
    hash_code_len : ``tau``, the bits of a hash code, 1 to 30.
    use_expectation : attend with the expected weights ``(1 - theta / pi)**tau``, at quadratic cost.
        ``False``: attend by sampling, at linear cost. This is the default, as in `yoso_attention`,
        since linear cost is the reason to change the attention of a model.
    seed : in evaluation the hashes of every layer and head follow from this number alone.
    hash_layout, rotations : ``layout`` and ``rotations`` of `yoso_core.model.yoso_attention`.
    oversample, grad, backward, backward_num_hash, variant : those of
        `yoso_core.model.yoso_attention`.

    >>> YosoAttentionOptions(num_hash=64, hash_code_len=9).use_expectation
    False
    """

    num_hash: int = 32
    hash_code_len: int = 8
    use_expectation: bool = False
    seed: int = 0
    hash_layout: Layout = "chained"
    rotations: int | None = None
    oversample: int = 0
    grad: Grad = "lower_bound"
    backward: Backward = "lsh"
    backward_num_hash: int | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        num_hash, hash_code_len = checks.hash_numbers(self.num_hash, self.hash_code_len)
        numbers = {"num_hash": num_hash, "hash_code_len": hash_code_len, "seed": checks.integer("seed", self.seed, 0)}
        for name, number in numbers.items():  # plain ints, whatever kind was given: they are saved in a config.json
            object.__setattr__(self, name, number)
        object.__setattr__(self, "oversample", checks.oversample(self.oversample, hash_code_len))
        object.__setattr__(self, "backward_num_hash", checks.backward_num_hash(self.backward_num_hash, num_hash))
        object.__setattr__(self, "rotations", checks.rotations("hash_layout", self.hash_layout, self.rotations, 1))
        checks.one_of("grad", self.grad, ("lower_bound", "exact"))
        checks.one_of("backward", self.backward, ("lsh", "expectation"))
        if not isinstance(self.use_expectation, bool):
            raise TypeError(f"use_expectation: need True or False, got {self.use_expectation!r}")
        if self.variant is not None:
            checks.one_of("variant", self.variant, [variant.name for variant in variants("yoso_attention")])


_default = YosoAttentionOptions()


def enable_yoso_attention(options: YosoAttentionOptions | None = None, *, model: PreTrainedModel | None = None) -> None:
    """Make ``attn_implementation="yoso"`` known to transformers, or let one model attend with YOSO.

    Parameters
    ----------
    options : without ``model``, the options of all models that have none of their own; ``None``:
        `YosoAttentionOptions()`. With ``model``, the options of that model; ``None``: those in its
        config, or `YosoAttentionOptions()`.
    model : this model attends with YOSO from now on, whatever it did before. Its options go to
        ``config.yoso_attention``, a dict, where they may be changed. They are saved with the model.
        Models that share a config share its options. The encoder of an encoder-decoder gets a
        config of its own, so that the decoder stays as it is.

    Raises
    ------
    ValueError : no attention of ``model`` calls transformers' attention interface (DeBERTa,
        transformers' own YOSO), or it is an encoder-decoder with a causal decoder.

    From the first call on, such a model also raises when it is built or loaded with
    ``attn_implementation="yoso"``, and in ``model.set_attn_implementation("yoso")``. To this end
    the call extends `PreTrainedModel.post_init` and `PreTrainedModel.set_attn_implementation`. They
    then also number the attention layers of models that do not number them (DistilBERT, ViT). It
    extends `PreTrainedModel.save_pretrained` too, which then writes the name and the options.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> model = BertModel(BertConfig(**sizes)).eval()
    >>> enable_yoso_attention(YosoAttentionOptions(num_hash=8, hash_code_len=4), model=model)
    >>> model(torch.tensor([[101, 7592, 2088, 102]])).last_hidden_state.shape
    torch.Size([1, 4, 16])
    """
    global _default
    if options is not None and not isinstance(options, YosoAttentionOptions):
        raise TypeError(f"options: need YosoAttentionOptions or None, got {type(options).__name__}")
    if model is not None and not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: need a PreTrainedModel of transformers, got {type(model).__name__}")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    _extend_models()
    if model is None:
        _default = options or YosoAttentionOptions()
        return
    layers = _attention_layers(model)
    _refuse_causal_decoder(model, layers)
    if model.config.is_encoder_decoder and model.config._attn_implementation != NAME:
        _separate_config(model)
    model.set_attn_implementation(NAME)
    for layer in layers:
        config: Any = layer.config
        if options is not None or getattr(config, "yoso_attention", None) is None:
            config.yoso_attention = dataclasses.asdict(options or YosoAttentionOptions())


def _refuse_causal_decoder(model: PreTrainedModel, layers: list[Any]) -> None:
    if model.config.is_encoder_decoder and any(getattr(layer, "is_causal", False) for layer in layers):
        raise ValueError(
            f'attn_implementation="yoso": {type(model).__name__} has a decoder that is causal, which hashing cannot follow; give YOSO to '
            "the encoder alone: enable_yoso_attention(model=model.get_encoder())"
        )


def _separate_config(model: PreTrainedModel) -> None:
    """Give a part of a model a config of its own."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own


# What transformers calls


def _mask(
    *,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **others: Any,
) -> Tensor | None:
    """For global layers bool ``(batch, 1, 1, n_k)``, or ``None`` where every key is kept; for local
    layers the mask of sdpa, ``(batch, 1, n_q, n_k)``.
    """
    if local_size is not None:
        return sdpa_mask(kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, **others)
    if mask_function is not bidirectional_mask_function:
        raise ValueError(
            'attn_implementation="yoso": every query meets every key that is not padding; this model asks for another pattern (causal, '
            "packed sequences or blocks), which hashing cannot follow"
        )
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != kv_length:
        raise ValueError(f"attention_mask: need shape (batch, {kv_length}), got {tuple(attention_mask.shape)}")
    return attention_mask[:, None, None, :]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The context ``(batch, n_q, heads, d_v)``, and the weights with ``output_attentions``.

    ``query`` is ``(batch, heads, n_q, d)``; ``key`` and ``value`` have as many heads, or fewer.
    """
    _refuse(module, is_causal, others)
    if key.shape[1] != query.shape[1]:  # grouped queries: several heads share one key and one value
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    if sliding_window is not None:
        return _local_attention(
            query,
            key,
            value,
            attention_mask,
            kind=type(module).__name__,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            output_attentions=bool(output_attentions),
        )
    options = _options(module)
    key_mask = None if attention_mask is None else _key_mask(attention_mask, key.shape[2])
    signs = None
    if not options.use_expectation and not module.training:
        signs = evaluation_draw(
            "signs",
            hash_seed=options.seed,
            layer=_layer_number(module),
            num_heads=query.shape[1],
            num_hash=options.num_hash,
            hash_code_len=options.hash_code_len + options.oversample,
            dim=query.shape[3],
            device=query.device,
            layout=options.hash_layout,
            rotations=options.rotations,
        )
    attend = yoso_attention_with_weights if output_attentions else yoso_attention
    found = attend(
        query,
        key,
        value,
        num_hash=options.num_hash,
        hash_code_len=options.hash_code_len,
        use_expectation=options.use_expectation,
        signs=signs,
        key_mask=key_mask,
        layout=options.hash_layout,
        rotations=options.rotations,
        oversample=options.oversample,
        variant=options.variant,
        grad=options.grad,
        backward=options.backward,
        backward_num_hash=options.backward_num_hash,
    )
    context, weights = found if isinstance(found, tuple) else (found, None)
    return context.transpose(1, 2).contiguous(), weights


_CHANGE_THE_WEIGHTS = frozenset(
    {"block_indices", "cache", "cu_seq_lens_k", "cu_seq_lens_q", "indices", "position_bias", "s_aux", "sinks", "softcap"}
)
"""Arguments that models of transformers give to their attention beside query, key, value and mask,
and that YOSO cannot take into account.
"""


def _refuse(module: nn.Module, is_causal: bool | None, others: dict[str, Any]) -> None:
    """Raise for causal attention, and for arguments that would change the weights. Models also hand
    down ids and counts, which change nothing.
    """
    # As in transformers, a module that does not say otherwise is causal.
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:
        raise ValueError(f'attn_implementation="yoso": {type(module).__name__} is causal; YOSO attends in both directions')
    for name, given in others.items():
        may_be_bias = isinstance(given, Tensor) and (given.dim() >= 3 or (given.dim() >= 1 and given.is_floating_point()))
        if may_be_bias or (given is not None and name in _CHANGE_THE_WEIGHTS):
            raise ValueError(
                f'attn_implementation="yoso": {type(module).__name__} gives {name}, which YOSO attention cannot take into account'
            )


def _key_mask(mask: Tensor, n_k: int) -> Tensor:
    """Bool ``(batch, 1 or heads, n_k)`` of a mask ``(batch, 1 or heads, 1, n_k)``."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: need a tensor, got {type(mask).__name__}")
    if mask.is_floating_point():
        raise TypeError(
            f"attention_mask: need a bool mask, True for keep, got an additive one of {mask.dtype}; YOSO has no scores to add a bias to"
        )
    if mask.dtype != torch.bool and values_can_be_read(mask) and not mask.is_cuda and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask: need 1 for a token and 0 for padding, got other numbers; an additive mask means the opposite")
    if mask.dim() != 4 or mask.shape[3] != n_k:
        raise ValueError(f"attention_mask: need shape (batch, {n_k}) given to the model, got {tuple(mask.shape)}")
    if mask.shape[2] != 1:
        raise ValueError(
            f"attention_mask: need one mask for all queries, shape (batch, {n_k}) given to the model, got {tuple(mask.shape)}; hashing "
            "cannot follow a mask that differs from query to query (causal, packed sequences)"
        )
    return mask[:, :, 0]


def _local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    kind: str,
    dropout: float,
    scaling: float | None,
    sliding_window: int,
    output_attentions: bool,
) -> tuple[Tensor, Tensor | None]:
    """Softmax within a window. The window is in the mask; without a mask it must hold all keys.
    ``kind`` is the class of the layer, for the error message.
    """
    n_q, n_k = query.shape[2], key.shape[2]
    if n_k > sliding_window if mask is None else mask.shape[2] != n_q:
        raise ValueError(
            f"attention_mask: {kind} attends within a window (sliding_window = {sliding_window}), and needs it as a mask "
            f"(batch, 1, {n_q}, {n_k})"
        )
    context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    context = context.transpose(1, 2).contiguous()
    if not output_attentions:
        return context, None
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        return context, scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
    return context, weights.masked_fill(~mask, 0).to(query.dtype)


def _options(module: nn.Module) -> YosoAttentionOptions:
    own = getattr(module.config, "yoso_attention", None)
    return _default if own is None else YosoAttentionOptions(**own)


def _layer_number(module: nn.Module) -> int:
    for name in ("layer_idx", "_yoso_layer"):
        number = getattr(module, name, None)
        if number is not None:
            return int(number)
    raise ValueError(
        f"{type(module).__name__}: has no layer number, from which its hashes would follow; give it a layer_idx, or call "
        "enable_yoso_attention(model=model) for its model"
    )


# Models that are built with the name


def _extend_models() -> None:
    """Extend transformers once, so that it checks every model that is built with the name or set to
    it, numbers its layers, and saves the name.
    """
    if getattr(PreTrainedModel.post_init, "checks_yoso_attention", False):
        return
    post_init, set_attn_implementation = PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation
    save_pretrained = PreTrainedModel.save_pretrained

    @wraps(post_init)
    def checked_post_init(self: PreTrainedModel) -> None:
        post_init(self)
        _prepare(self)

    @wraps(set_attn_implementation)
    def checked_set(self: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        before = [(part.config, part.config._attn_implementation) for part in _parts(self)]
        set_attn_implementation(self, attn_implementation, *args, **kwargs)
        try:
            if attn_implementation == NAME and self.config._attn_implementation != NAME:
                raise _never_calls(self)
            _prepare(self)
        except ValueError:
            for config, name in before:
                config._attn_implementation_internal = name
            raise

    @wraps(save_pretrained)
    def telling_save(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        with _named_in_the_config(self):
            save_pretrained(self, *args, **kwargs)

    checked_post_init.checks_yoso_attention = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation = checked_post_init, checked_set
    PreTrainedModel.save_pretrained = telling_save


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def _with_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    parts = (getattr(config, name) for name in config.sub_configs)
    return [config, *(inner for part in parts if part is not None for inner in _with_parts(part))]


def _implementation(config: PreTrainedConfig) -> str | dict[str, Any] | None:
    """What to give as ``attn_implementation`` for the same parts to attend with YOSO again."""
    own = NAME if config._attn_implementation == NAME else None
    parts = {name: _implementation(getattr(config, name)) for name in config.sub_configs if getattr(config, name) is not None}
    if all(part == own for part in parts.values()):
        return own
    return ({"": own} if own else {}) | {name: part for name, part in parts.items() if part}


@contextmanager
def _named_in_the_config(model: PreTrainedModel) -> Iterator[None]:
    """While the model is saved, its config says which parts attend with YOSO, and how. transformers
    writes neither by itself, but reads ``attn_implementation`` from a ``config.json``.
    """
    saved = [config for config in _with_parts(model.config) if config._attn_implementation == NAME]
    if any(part.config._attn_implementation == NAME and all(part.config is not config for config in saved) for part in _parts(model)):
        warnings.warn(
            f"{type(model).__name__}: a part of it attends with YOSO by a config of its own, which is not saved; after loading, call "
            "enable_yoso_attention for that part again",
            stacklevel=4,
        )
    lent = [config for config in saved if getattr(config, "yoso_attention", None) is None]
    if saved:
        model.config.attn_implementation = _implementation(model.config)
    for config in lent:
        config.yoso_attention = dataclasses.asdict(_default)
    try:
        yield
    finally:
        if saved:
            del model.config.attn_implementation
        for config in lent:
            del config.yoso_attention


def _prepare(model: PreTrainedModel) -> None:
    """Check that every part of the model that is set to YOSO calls the interface, and number the
    layers in the order in which the class defines them.
    """
    for part in _parts(model):
        if part.config._attn_implementation == NAME:
            layers = _attention_layers(part)
            if not layers:
                raise _never_calls(part)
            _refuse_causal_decoder(part, layers)
            for number, layer in enumerate(layers):
                layer._yoso_layer = number  # a part comes after the whole, so a layer keeps its number in the innermost part


def _never_calls(model: PreTrainedModel) -> ValueError:
    return ValueError(
        f'attn_implementation="yoso": {type(model).__name__} computes its attention itself and never calls transformers\' attention '
        "interface, so YOSO would not run; where it is a part of a larger model, give a dict that leaves it out"
    )


def _attention_layers(model: nn.Module) -> list[Any]:
    modules: list[Any] = list(model.modules())
    return [module for module in modules if not isinstance(module, PreTrainedModel) and _calls_the_interface(module.__class__)]


@cache
def _calls_the_interface(kind: type[nn.Module]) -> bool:
    """Whether a method of the class uses transformers' table of attention functions."""
    functions: list[Any] = [inspect.unwrap(function) for _, function in inspect.getmembers(kind, inspect.isfunction)]
    return any("ALL_ATTENTION_FUNCTIONS" in function.__code__.co_names for function in functions)
