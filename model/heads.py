"""YosoModel and its heads. Classes, parameters and outputs have the names that they have in
transformers, so checkpoints load both ways.
"""

import inspect
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithCrossAttentions,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from yoso_core import checks
from yoso_core.model.configuration import YosoConfig
from yoso_core.model.layers import FIRST_POSITION, YosoEmbeddings, YosoEncoder
from yoso_core.model.values import values_can_be_read

IGNORED = -100
"""A label that does not count."""


def _check_labels(name: str, labels: Tensor, shape: tuple[int, ...], num_labels: int) -> None:
    """Check class labels: their shape, and that each is -100 or in [0, num_labels). On a GPU, and
    where there are no values to look at, only the shape and the dtype are checked.
    """
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name}: need the shape {shape}, got {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise TypeError(f"{name}: need integers, got {labels.dtype}")
    if labels.is_cuda or not values_can_be_read(labels):
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_labels))]
    if wrong.numel():
        raise ValueError(f"{name}: need {IGNORED} (ignored) or classes in [0, {num_labels}), got {int(wrong[0])}")


_CHANGE_THE_RESULT = frozenset(
    {
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "head_mask",
        "next_sentence_label",
        "past_key_values",
    }
)
"""Arguments of other encoders that change what these give, and that no YOSO has."""

_NOT_MISSPELT = frozenset({"global_attention_mask"})
"""Longformer's, for which YOSO has no use: every token attends to all."""


@cache
def _arguments(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(kind.forward).parameters if name not in ("self", "others"))


def _check_others(model: "YosoPreTrainedModel", others: dict[str, Any]) -> None:
    """Check the arguments of a call that ``forward`` does not name. What a tokenizer, a data set or
    a trainer adds passes, and is ignored as in transformers: ``special_tokens_mask``, ``length``,
    ``idx``, ``use_cache``. ``TypeError`` for an argument of another head, for a name that is nearly
    one of ours, and for what would change the result. Compiled code is not checked.
    """
    if not others or torch.compiler.is_compiling():
        return
    kind = type(model).__name__
    own = _arguments(cast(Any, type(model)))
    heads = (YosoForPreTraining, YosoForSequenceClassification, YosoForQuestionAnswering)
    elsewhere = {name for head in heads for name in _arguments(cast(Any, head))}
    for name, given in others.items():
        if name in elsewhere or (name in _CHANGE_THE_RESULT and given is not None):
            raise TypeError(f"{name}: {kind} has no such argument, and would give another result than is meant with it; leave it out")
        meant = [] if name in _NOT_MISSPELT else get_close_matches(name, {*own, *elsewhere}, n=1, cutoff=0.75)
        if meant and name not in _CHANGE_THE_RESULT:
            raise TypeError(f"{name}: {kind} has no such argument; {meant[0]} is probably meant")


class YosoPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """The base class of every YOSO model: loading and saving, initialization, gradient
    checkpointing, a longer position table.

    >>> config = YosoConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> isinstance(YosoModel(config), YosoPreTrainedModel)
    True
    """

    config_class = YosoConfig
    config: YosoConfig
    base_model_prefix = "yoso"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ("YosoEmbeddings", "YosoLayer")
    # Tables of numbers that older versions of transformers kept in a checkpoint.
    _keys_to_ignore_on_load_unexpected = (r"embeddings\.position_ids", r"embeddings\.token_type_ids")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, YosoLMPredictionHead):
            init.zeros_(module.bias)

    def extend_positions(self, max_position_embeddings: int) -> None:
        """Lengthen the position table, in place, for texts of ``max_position_embeddings`` tokens.

        The new rows repeat the learned ones in order, so nearby positions stay nearby. Longformer
        started from RoBERTa in the same way (Beltagy et al. 2020, arXiv 2004.05150). Train the
        model on longer texts before you use it on them. ``ValueError`` for a number below that of
        the table, and where the table is not a plain one on this machine: adapters and offloading
        come afterwards.

        >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = YosoModel(YosoConfig(**sizes, max_position_embeddings=10))
        >>> model.extend_positions(20)
        >>> model.embeddings.position_embeddings.weight.shape  # two rows before the first token
        torch.Size([22, 16])
        """
        embeddings = self.base_model.embeddings
        table = embeddings.position_embeddings
        if type(table) is not nn.Embedding or table.weight.is_meta:
            raise ValueError(
                f"position_embeddings: need a plain table with its values in memory, got {type(table).__module__}.{type(table).__name__}; "
                "lengthen the table before adapters are put in, the model is sharded, or it is offloaded"
            )
        old = table.weight
        learned = old.shape[0] - FIRST_POSITION
        wanted = checks.integer("max_position_embeddings", max_position_embeddings, learned)
        rows = FIRST_POSITION + torch.arange(wanted, device=old.device) % learned
        longer = torch.cat([old.detach()[:FIRST_POSITION], old.detach()[rows]])
        embeddings.position_embeddings = nn.Embedding(FIRST_POSITION + wanted, old.shape[1])
        embeddings.position_embeddings.weight = nn.Parameter(longer, old.requires_grad)
        self.config.max_position_embeddings = wanted

    def _give(self, output: ModelOutput, return_dict: bool | None) -> Any:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class YosoModel(YosoPreTrainedModel):
    """The encoder without a head.

    >>> config = YosoConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> model = YosoModel(config).eval()
    >>> model(torch.tensor([[0, 11, 23, 2]])).last_hidden_state.shape
    torch.Size([1, 4, 16])
    """

    def __init__(self, config: YosoConfig) -> None:
        super().__init__(config)
        self.embeddings = YosoEmbeddings(config)
        self.encoder = YosoEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithCrossAttentions | tuple[Tensor, ...]:
        """
        Parameters
        ----------
        input_ids : ``(batch, n)``; or inputs_embeds : ``(batch, n, hidden_size)`` in their place.
        attention_mask : ``(batch, n)``, 1 or true for a token, 0 for padding; also ``(1, n)``, and
            ``(batch, 1, 1, n)``. Padding attends to nothing, and nothing attends to it: see below.
            The hidden states of padding have no meaning.
        token_type_ids : ``(batch, n)``. ``None``: zeros.
        position_ids : ``(batch, n)`` or ``(1, n)``, rows of the position table. ``None``: 2, 3, 4,
            and so on. Give them where padding is on the left, so that the first token of every text
            has row 2.
        output_attentions : give the weights ``(batch, heads, n, n)`` of every layer, in the graph:
            the expected ones, or where it is sampled the share of hashes that collide. Memory is
            then quadratic.
        output_hidden_states : give the hidden states of every layer, the embeddings first.
        return_dict : ``False``: give a tuple.
        others : what tokenizers, data sets and trainers add (``special_tokens_mask``, ``length``,
            ``idx``, ``use_cache``) is ignored, as in transformers. ``TypeError`` for a name that is
            nearly one of these, for an argument of another head, and for what would change the
            result (``encoder_hidden_states``, ``head_mask``, ``past_key_values``), but for compiled
            code.

        Returns
        -------
        ``last_hidden_state (batch, n, hidden_size)``, and ``hidden_states`` and ``attentions``
        where they were asked for.

        A padded text and the same text alone: attention gives the same for the same queries, keys
        and values. Matrix products of another shape round differently, though. With the expectation
        the hidden states agree to 1e-5. Sampled in float32, a rounding may turn over a bit of a
        code, and the layers above spread it. In 12 layers with random weights up to 0.11 was seen
        on hidden states, and 0.002 to 0.02 on logits; in float64 6e-15. Where
        more is needed: a float64 model, the same shape every time (``padding="max_length"``, one
        batch size), or the expectation.
        """
        _check_others(self, others)
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give input_ids or inputs_embeds, one of the two")
        shape = _check_shapes(input_ids, inputs_embeds, token_type_ids, position_ids, config.hidden_size)
        if input_ids is not None and values_can_be_read(input_ids):
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        mask = _token_mask(attention_mask, shape)
        hidden, states, weights = self.encoder(
            self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, mask),
            mask,
            output_attentions,
            output_hidden_states,
        )
        return cast(
            BaseModelOutputWithCrossAttentions,
            self._give(BaseModelOutputWithCrossAttentions(last_hidden_state=hidden, hidden_states=states, attentions=weights), return_dict),
        )


def _check_shapes(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, hidden_size: int
) -> tuple[int, int]:
    """Check shapes and dtypes; returns the shape (batch, n) that the arguments share."""
    if input_ids is not None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: need the shape (batch, n), got {tuple(input_ids.shape)}")
        if input_ids.is_floating_point():
            raise TypeError(f"input_ids: need integers, got {input_ids.dtype}")
        batch, n = input_ids.shape
    else:
        assert inputs_embeds is not None  # the caller checked it
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != hidden_size:
            raise ValueError(f"inputs_embeds: need the shape (batch, n, {hidden_size}), got {tuple(inputs_embeds.shape)}")
        batch, n = inputs_embeds.shape[:2]
    if n == 0:
        raise ValueError(f"{'input_ids' if inputs_embeds is None else 'inputs_embeds'}: need at least one token, got none")
    for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids is not None and (ids.dim() != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != n):
            raise ValueError(f"{name}: need the shape {(batch, n)} or {(1, n)}, got {tuple(ids.shape)}")
        if ids is not None and ids.is_floating_point():
            raise TypeError(f"{name}: need integers, got {ids.dtype}")
    return batch, n


def _broadcasts(given: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether ``given`` is ``shape``, or has 1 in the place of a dim that is not the last."""
    return len(given) == len(shape) and given[-1] == shape[-1] and all(x in (1, n) for x, n in zip(given, shape, strict=True))


def _token_mask(attention_mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Bool of ``shape``, true for tokens, of a mask of that shape, of one row for all, or of either
    with the two dims of length 1 of a mask for scores, ``(batch, 1, 1, n)``.
    """
    if attention_mask is None:
        return None
    mask, given = attention_mask, tuple(attention_mask.shape)
    if mask.dim() == len(shape) + 2 and given[-3:-1] == (1, 1):
        mask = mask[..., 0, 0, :]
    if not _broadcasts(mask.shape, shape):
        names = "(batch, n)" if len(shape) == 2 else "(batch, choices, n)"
        other = "; a mask that differs from query to query cannot be followed by hashing" if given[-2:] == (shape[-1],) * 2 else ""
        raise ValueError(f"attention_mask: need the shape {names} = {tuple(shape)}, got {given}{other}")
    # Masks are integers as a rule. On a GPU they are not checked: a look would wait for the GPU.
    plain = mask.dtype == torch.bool or (mask.is_cuda and not mask.is_floating_point())
    # An additive mask, of 0 and very negative numbers, means the opposite.
    if not plain and values_can_be_read(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask: need 1 for a token and 0 for padding, got other numbers; an additive mask means the opposite")
    return (mask != 0).expand(shape)


# Heads


class YosoPredictionHeadTransform(nn.Module):
    """``LayerNorm(act(W hidden + b))``."""

    def __init__(self, config: YosoConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.LayerNorm(self.transform_act_fn(self.dense(hidden_states))))


class YosoLMPredictionHead(nn.Module):
    """Scores over the vocabulary. The decoder shares its weights with the word embeddings, and its
    bias is ``bias``.
    """

    def __init__(self, config: YosoConfig) -> None:
        super().__init__()
        self.transform = YosoPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.transform(hidden_states)))


class YosoOnlyMLMHead(nn.Module):
    def __init__(self, config: YosoConfig) -> None:
        super().__init__()
        self.predictions = YosoLMPredictionHead(config)

    def forward(self, sequence_output: Tensor) -> Tensor:
        return cast(Tensor, self.predictions(sequence_output))


class _WithMaskedLM(YosoPreTrainedModel):
    """The part that `YosoForMaskedLM` and `YosoForPreTraining` share."""

    accepts_loss_kwargs = True
    _tied_weights_keys = {  # noqa: RUF012  (transformers looks for a dict)
        "cls.predictions.decoder.weight": "yoso.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def get_output_embeddings(self) -> nn.Linear:
        return cast(nn.Linear, self.cls.predictions.decoder)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def _masked_lm_loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        _check_labels("labels", labels, tuple(logits.shape[:-1]), logits.shape[-1])
        return _cross_entropy(logits.flatten(0, 1), labels.flatten(), num_items_in_batch)


def _cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None, ignored: int = IGNORED) -> Tensor:
    """The mean over the labels that count. Where a training step is made of several batches: the
    sum divided by ``num_items``, the labels of the whole step.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half precision is widened
    if num_items is None:
        return F.cross_entropy(logits, labels.long(), ignore_index=ignored)
    return F.cross_entropy(logits, labels.long(), ignore_index=ignored, reduction="sum") / num_items


class YosoForMaskedLM(_WithMaskedLM):
    """Predict the masked words.

    >>> config = YosoConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> model = YosoForMaskedLM(config).eval()
    >>> ids = torch.tensor([[0, 11, 50264, 2]])  # 50264 is the mask token of RoBERTa's vocabulary
    >>> model(ids).logits.shape
    torch.Size([1, 4, 50265])
    """

    def __init__(self, config: YosoConfig) -> None:
        super().__init__(config)
        self.yoso = YosoModel(config)
        self.cls = YosoOnlyMLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """
        Parameters
        ----------
        labels : ``(batch, n)``, the ids of the words, and -100 where nothing is to be predicted.
        num_items_in_batch : the number by which the loss is divided: where a training step is made
            of several batches, the labels of all of them. ``None``: the labels given here.
        The others are those of `YosoModel`.
        """
        _check_others(self, others)
        outputs = self.yoso(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.cls(outputs.last_hidden_state)
        loss = None if labels is None else self._masked_lm_loss(logits, labels, num_items_in_batch)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return cast(MaskedLMOutput, self._give(output, return_dict))


@dataclass
class YosoForPreTrainingOutput(ModelOutput):  # type: ignore[misc]
    """``loss`` is the sum of the losses whose labels were given."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    sop_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class YosoSentenceOrderHead(nn.Module):
    """Are two segments in order (0) or exchanged (1)? Scores from the first token."""

    def __init__(self, config: YosoConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.out_proj = nn.Linear(config.hidden_size, 2)

    def forward(self, sequence_output: Tensor) -> Tensor:
        return cast(Tensor, self.out_proj(self.dropout(torch.tanh(self.dense(sequence_output[:, 0])))))


class YosoForPreTraining(_WithMaskedLM):
    """Predict the masked words and the order of two segments, as the authors trained it.

    >>> config = YosoConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> out = YosoForPreTraining(config).eval()(torch.tensor([[0, 11, 50264, 2]]))
    >>> out.prediction_logits.shape, out.sop_logits.shape
    (torch.Size([1, 4, 50265]), torch.Size([1, 2]))
    """

    # Trainer counts the labels of the words in a step, not those of the order. With the sum of the
    # first loss divided by that number, the second loss would be too large.
    accepts_loss_kwargs = False

    def __init__(self, config: YosoConfig) -> None:
        super().__init__(config)
        self.yoso = YosoModel(config)
        self.cls = YosoOnlyMLMHead(config)
        self.sop_classifier = YosoSentenceOrderHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> YosoForPreTrainingOutput | tuple[Tensor, ...]:
        """
        Parameters
        ----------
        sentence_order_label : ``(batch,)``, 0 for segments in order, 1 for segments exchanged.
        The others are those of `YosoForMaskedLM`.
        """
        _check_others(self, others)
        outputs = self.yoso(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        prediction_logits = self.cls(outputs.last_hidden_state)
        sop_logits = self.sop_classifier(outputs.last_hidden_state)
        losses = []
        if labels is not None:
            losses.append(self._masked_lm_loss(prediction_logits, labels, num_items_in_batch))
        if sentence_order_label is not None:
            _check_labels("sentence_order_label", sentence_order_label, tuple(sop_logits.shape[:1]), 2)
            losses.append(_cross_entropy(sop_logits, sentence_order_label))
        output = YosoForPreTrainingOutput(
            loss=torch.stack(losses).sum() if losses else None,
            prediction_logits=prediction_logits,
            sop_logits=sop_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return cast(YosoForPreTrainingOutput, self._give(output, return_dict))


class YosoClassificationHead(nn.Module):
    """Scores from the first token: dropout, dense, activation, dropout, dense."""

    def __init__(self, config: YosoConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        x = self.act_fn(self.dense(self.dropout(features[:, 0])))
        return cast(Tensor, self.out_proj(self.dropout(x)))


class YosoForSequenceClassification(YosoPreTrainedModel):
    """Predict one label, several labels, or numbers for a text, from its first token.

    >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> model = YosoForSequenceClassification(YosoConfig(**sizes, num_labels=3)).eval()
    >>> model(torch.tensor([[0, 11, 23, 2]]), labels=torch.tensor([1])).logits.shape
    torch.Size([1, 3])
    """

    def __init__(self, config: YosoConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.yoso = YosoModel(config)
        self.classifier = YosoClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """
        Parameters
        ----------
        labels : what to predict. ``config.problem_type`` says which kind:

            - ``"regression"``: float ``(batch,)`` or ``(batch, num_labels)``, mean squared error;
            - ``"single_label_classification"``: integers ``(batch,)`` in [0, num_labels), cross
              entropy;
            - ``"multi_label_classification"``: float ``(batch, num_labels)`` of 0 and 1, binary
              cross entropy.

            Where it is ``None``, it is ``"regression"`` for ``num_labels == 1``, else the second
            for integers and the third for floats.
        The others are those of `YosoModel`.
        """
        _check_others(self, others)
        outputs = self.yoso(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(outputs.last_hidden_state)
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return cast(SequenceClassifierOutput, self._give(output, return_dict))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        batch, num_labels = logits.shape
        problem = self.config.problem_type
        if problem is None:
            of_many = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            problem = "regression" if num_labels == 1 else of_many
        checks.one_of("problem_type", problem, ("regression", "single_label_classification", "multi_label_classification"))
        if problem == "single_label_classification":
            if labels.dim() == 2 and labels.shape[1] == 1:
                labels = labels[:, 0]
            _check_labels("labels", labels, (batch,), num_labels)
            return _cross_entropy(logits, labels)
        if num_labels == 1 and labels.shape == (batch,):
            labels = labels[:, None]
        if labels.shape != logits.shape:
            raise ValueError(f"labels: for {problem} need the shape {(batch, num_labels)}, got {tuple(labels.shape)}")
        if problem == "regression":
            return F.mse_loss(logits, labels.to(logits.dtype))
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class YosoForMultipleChoice(YosoPreTrainedModel):
    """Which of several texts fits? A score for each text, from its first token.

    >>> config = YosoConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> model = YosoForMultipleChoice(config).eval()
    >>> model(torch.tensor([[[0, 11, 2], [0, 23, 2]]])).logits.shape  # one question, two choices
    torch.Size([1, 2])
    """

    def __init__(self, config: YosoConfig) -> None:
        super().__init__(config)
        self.yoso = YosoModel(config)
        self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> MultipleChoiceModelOutput | tuple[Tensor, ...]:
        """
        Parameters
        ----------
        labels : ``(batch,)``, the right choice.
        The others are those of `YosoModel` with one more dim: ``(batch, choices, n)``. Where they
            are alike for all texts, or for all choices, that dim may be 1.

        Returns
        -------
        ``logits (batch, choices)``. Hidden states and attentions have ``batch * choices`` rows.
        """
        _check_others(self, others)
        given = input_ids if input_ids is not None else inputs_embeds
        needed = 3 if input_ids is not None else 4
        if given is None:
            raise ValueError("input_ids: give input_ids or inputs_embeds, one of the two")
        if given.dim() != needed:
            raise ValueError(
                f"{'input_ids' if needed == 3 else 'inputs_embeds'}: need the shape (batch, choices, n{', hidden_size' * (needed == 4)}), "
                f"got {tuple(given.shape)}"
            )
        shape = tuple(given.shape[:3])
        rows = {}
        for name, x in (
            ("input_ids", input_ids),
            ("attention_mask", _token_mask(attention_mask, shape)),
            ("token_type_ids", token_type_ids),
            ("position_ids", position_ids),
            ("inputs_embeds", inputs_embeds),
        ):
            if x is not None and not _broadcasts(x.shape[:3], shape):
                raise ValueError(f"{name}: need the shape (batch, choices, n) of the input, {shape}, got {tuple(x.shape)}")
            rows[name] = None if x is None else x.expand(*shape, *x.shape[3:]).flatten(0, 1)
        outputs = self.yoso(**rows, output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True)
        pooled = F.relu(self.pre_classifier(outputs.last_hidden_state[:, 0]))
        logits = self.classifier(pooled).reshape(shape[:2])
        loss = None
        if labels is not None:
            _check_labels("labels", labels, shape[:1], shape[1])
            loss = _cross_entropy(logits, labels)
        output = MultipleChoiceModelOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return cast(MultipleChoiceModelOutput, self._give(output, return_dict))


class YosoForTokenClassification(YosoPreTrainedModel):
    """Predict a label for every token.

    >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> model = YosoForTokenClassification(YosoConfig(**sizes, num_labels=3)).eval()
    >>> model(torch.tensor([[0, 11, 23, 2]])).logits.shape
    torch.Size([1, 4, 3])
    """

    accepts_loss_kwargs = True

    def __init__(self, config: YosoConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.yoso = YosoModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> TokenClassifierOutput | tuple[Tensor, ...]:
        """
        Parameters
        ----------
        labels : ``(batch, n)`` in [0, num_labels), or -100 for a token that does not count. Padding
            never counts.
        num_items_in_batch : see `YosoForMaskedLM`.
        The others are those of `YosoModel`.
        """
        _check_others(self, others)
        outputs = self.yoso(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            _check_labels("labels", labels, tuple(logits.shape[:2]), logits.shape[-1])
            keep = _token_mask(attention_mask, tuple(logits.shape[:2]))
            labels = labels if keep is None else labels.masked_fill(~keep, IGNORED)
            loss = _cross_entropy(logits.flatten(0, 1), labels.flatten(), num_items_in_batch)
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return cast(TokenClassifierOutput, self._give(output, return_dict))


class YosoForQuestionAnswering(YosoPreTrainedModel):
    """Where in a text does the answer begin and end?

    >>> config = YosoConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> out = YosoForQuestionAnswering(config).eval()(torch.tensor([[0, 11, 23, 2]]))
    >>> out.start_logits.shape, out.end_logits.shape
    (torch.Size([1, 4]), torch.Size([1, 4]))
    """

    def __init__(self, config: YosoConfig) -> None:
        super().__init__(config)
        self.num_labels = 2  # a beginning and an end, whatever the config says for other heads
        self.yoso = YosoModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        """
        Parameters
        ----------
        start_positions, end_positions : ``(batch,)``, both or neither: the first and the last token
            of the answer. A position beyond the text does not count: the answer was cut off. A
            negative position counts as 0, which means that there is no answer.
        The others are those of `YosoModel`.
        """
        _check_others(self, others)
        if (start_positions is None) != (end_positions is None):
            missing = "start_positions" if start_positions is None else "end_positions"
            raise ValueError(f"{missing}: give start_positions and end_positions, both or neither")
        outputs = self.yoso(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = _position_loss("start_positions", start_logits, start_positions)
            loss = (start_loss + _position_loss("end_positions", end_logits, end_positions)) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return cast(QuestionAnsweringModelOutput, self._give(output, return_dict))


def _position_loss(name: str, logits: Tensor, positions: Tensor) -> Tensor:
    batch, n = logits.shape
    if positions.dim() == 2 and positions.shape[1] == 1:
        positions = positions[:, 0]
    if tuple(positions.shape) != (batch,):
        raise ValueError(f"{name}: need the shape {(batch,)}, got {tuple(positions.shape)}")
    if positions.is_floating_point():
        raise TypeError(f"{name}: need integers, got {positions.dtype}")
    return _cross_entropy(logits, positions.long().clamp(0, n), ignored=n)
