"""The model's settings: every field of transformers' YosoConfig, and five more."""

from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from yoso_core import checks
from yoso_core.reference.hashing import Layout


class YosoConfig(PreTrainedConfig):  # type: ignore[misc]
    """Settings of a YOSO model. A ``config.json`` of a YOSO checkpoint of transformers is one of
    these.

    A model reads how to attend whenever it runs: ``use_expectation``, ``num_hash``,
    ``hash_code_len``, ``use_fast_hash``, ``lsh_backward``, ``grad``, ``kernel_variant``,
    ``hash_layout``, ``rotations``, ``oversample``, ``backward_num_hash`` and ``hash_seed``. So
    ``model.config.use_expectation = False`` takes effect at once.

    Parameters
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act,
        hidden_dropout_prob, max_position_embeddings, type_vocab_size, initializer_range,
        layer_norm_eps, pad_token_id, bos_token_id, eos_token_id, tie_word_embeddings : as in every
        encoder of transformers. The position table has ``max_position_embeddings + 2`` rows, and
        the first token stands at row 2, as in RoBERTa.
    attention_probs_dropout_prob, add_cross_attention : kept in the file, without effect (in
        transformers as well).
    use_expectation : attend with the expected weights ``(1 - theta / pi)**tau``, at quadratic cost.
        ``False``: attend by sampling, at linear cost.
    hash_code_len : ``tau``, the bits of a hash code, 1 to 30.
    num_hash : ``m``, the number of hashes.
    conv_window : width of the depth-wise convolution over the values that is added to the context
        (YOSO-C), an odd number. ``None``: no convolution.
    use_fast_hash : hash by the fast Hadamard rotation. ``False``: by Gaussian planes.
    lsh_backward : take the gradients of sampled attention from the collisions, at linear cost.
        ``False``: from the expected weights, at quadratic cost.
    grad : which gradient of the weights, ``"lower_bound"`` (the paper's) or ``"exact"``; see
        `yoso_core.model.yoso_attention`.
    kernel_variant : the name of a variant of ``yoso_attention``, as
        ``yoso_core.variants("yoso_attention")`` lists them. ``None``: the best that can run.
    hash_layout : where the bits of the fast hash come from, ``"chained"`` or ``"paper"``; see
        `yoso_core.fast_hash`. A model that was trained by sampling with the paper's kernels has
        learned with their bias, and may do better with ``"paper"``.
    rotations : of a chain; see `yoso_core.sample_signs`.
    oversample : ``s``: hash with ``tau + s`` bits, and average over all choices of ``tau`` of them;
        see `yoso_core.yoso_attention`.
    backward_num_hash : from how many of the hashes the gradients of query and key come; ``None``
        for all. See `yoso_core.model.yoso_attention`.
    hash_seed : in evaluation the hashes of every layer and head follow from this number alone, so
        that a result repeats.

    Raises
    ------
    ValueError, TypeError : a setting is wrong by itself; the message names it. What two settings
        say together is checked where a model is made of them: that ``hidden_size`` divides into the
        heads, and that ``pad_token_id`` is a word.

    >>> config = YosoConfig(hidden_size=32, num_attention_heads=4, num_hash=16, hash_code_len=6)
    >>> config.num_hash, config.use_expectation
    (16, True)
    """

    model_type = "yoso"

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 4096
    type_vocab_size: int = 1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    use_expectation: bool = True
    hash_code_len: int = 9
    num_hash: int = 64
    conv_window: int | None = None
    use_fast_hash: bool = True
    lsh_backward: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    grad: Literal["lower_bound", "exact"] = "lower_bound"
    kernel_variant: str | None = None
    hash_seed: int = 0
    hash_layout: Layout = "chained"
    rotations: int | None = None
    oversample: int = 0
    backward_num_hash: int | None = None

    def __post_init__(self, **others: Any) -> None:
        super().__post_init__(**others)
        for name in _SIZES:
            setattr(self, name, checks.integer(name, getattr(self, name), 1))
        self.num_hash, self.hash_code_len = checks.hash_numbers(self.num_hash, self.hash_code_len)
        self.hash_seed = checks.integer("hash_seed", self.hash_seed, 0, (1 << 63) - 1)
        checks.one_of("grad", self.grad, ("lower_bound", "exact"))
        self.rotations = checks.rotations("hash_layout", self.hash_layout, self.rotations, 1)
        self.oversample = checks.oversample(self.oversample, self.hash_code_len)
        self.backward_num_hash = checks.backward_num_hash(self.backward_num_hash, self.num_hash)
        if self.conv_window is not None:
            self.conv_window = checks.integer("conv_window", self.conv_window, 1)
            if self.conv_window % 2 == 0:
                raise ValueError(f"conv_window: need an odd width, so that it has a middle, got {self.conv_window}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):  # the text "false" would count as true
                raise TypeError(f"{name}: need True or False, got {getattr(self, name)!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= _number(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name}: need a probability, 0 to 1, got {getattr(self, name)}")
        for name in ("initializer_range", "layer_norm_eps"):
            if not _number(name, getattr(self, name)) >= 0:
                raise ValueError(f"{name}: need a number of at least 0, got {getattr(self, name)}")
        checks.one_of("hidden_act", self.hidden_act, tuple(ACT2FN))
        if self.pad_token_id is not None:
            self.pad_token_id = checks.integer("pad_token_id", self.pad_token_id, 0)
        if self.kernel_variant is not None:
            _check_variant(self.kernel_variant)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)

_SWITCHES = ("use_expectation", "use_fast_hash", "lsh_backward", "tie_word_embeddings", "add_cross_attention")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: need a number, got {value!r}")
    return value


def _check_variant(name: object) -> None:
    """Refuse a name that no variant has. A variant that cannot run here raises when the model
    runs.
    """
    from yoso_core.registry import variants

    checks.one_of("kernel_variant", name, [variant.name for variant in variants("yoso_attention")])
