"""The encoder: embeddings, attention, feed-forward network. Classes and parameters have the names
that they have in transformers' YOSO.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import apply_chunking_to_forward

from yoso_core import checks
from yoso_core.model.attention import yoso_attention, yoso_attention_with_weights
from yoso_core.model.configuration import YosoConfig
from yoso_core.model.draws import evaluation_draw
from yoso_core.model.values import values_can_be_read

FIRST_POSITION = 2
"""The first token's row in the position table, as in RoBERTa."""


def rows_of(table: nn.Module) -> int | None:
    """The rows of a table of embeddings, by its weight, which adapters that stand in its place pass
    on. ``None`` where no weight is to be seen until the table is called: sharded, or in a wrapper
    that passes on nothing.
    """
    shape: tuple[int, ...] = getattr(getattr(table, "weight", None), "shape", ())
    return shape[0] if len(shape) == 2 else None


def check_ids(name: str, ids: Tensor, size: int | None, why: str) -> None:
    """Check that ids index a table of ``size`` rows. On a GPU, and where there are no values to
    look at, the lookup itself is the check: a look at the ids would wait for the GPU.
    """
    if size is None or ids.is_cuda or not values_can_be_read(ids) or not ids.numel():
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise ValueError(f"{name}: need ids in [0, {size}), the {why}, got {low if low < 0 else high}")


class YosoEmbeddings(nn.Module):
    """``LayerNorm(word + position + token type)``, then dropout."""

    def __init__(self, config: YosoConfig) -> None:
        super().__init__()
        if config.pad_token_id is not None:
            checks.integer("pad_token_id", config.pad_token_id, 0, config.vocab_size - 1)
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings + FIRST_POSITION, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """``(batch, n, hidden)``. ``attention_mask`` is bool ``(batch, n)``: the words of padding
        count as zeros, whatever stands there. NaN in padding would be NaN in the gradients of
        weights, since NaN times zero is NaN.

        Every table is asked through its own call, once for each text, so that hooks on it run and
        the gradients of single texts can be told apart.
        """
        if inputs_embeds is None:
            assert input_ids is not None  # YosoModel checks that one of the two is given
            check_ids("input_ids", input_ids, rows_of(self.word_embeddings), "vocabulary")
            words = self.word_embeddings(input_ids)
        else:
            words = inputs_embeds
        if attention_mask is not None:
            words = words.masked_fill(~attention_mask[..., None], 0)
        batch, tokens = words.shape[:2]
        rows = rows_of(self.position_embeddings)
        if position_ids is None:
            if rows is not None and tokens > rows - FIRST_POSITION:
                given = "inputs_embeds" if input_ids is None else "input_ids"
                raise ValueError(
                    f"{given}: {tokens} tokens are more than max_position_embeddings = {rows - FIRST_POSITION}; cut the text, or "
                    "lengthen the position table with extend_positions and train on long texts"
                )
            position_ids = torch.arange(FIRST_POSITION, FIRST_POSITION + tokens, device=words.device)[None]
        else:
            check_ids("position_ids", position_ids, rows, f"rows of the position table (the first token stands at {FIRST_POSITION})")
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=words.device)
        else:
            check_ids("token_type_ids", token_type_ids, rows_of(self.token_type_embeddings), "token types (type_vocab_size)")
        types = self.token_type_embeddings(token_type_ids.expand(batch, -1))
        embeddings = words + types + self.position_embeddings(position_ids.expand(batch, -1))
        return cast(Tensor, self.dropout(self.LayerNorm(embeddings)))


class YosoSelfAttention(nn.Module):
    """YOSO attention in every head; with ``conv_window`` a depth-wise convolution over the values
    is added (YOSO-C).
    """

    def __init__(self, config: YosoConfig, layer: int = 0) -> None:
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: hidden_size = {config.hidden_size} does not divide into {config.num_attention_heads} heads of equal "
                "size"
            )
        self.config = config
        self.layer = layer
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)
        if config.conv_window is not None:
            self.conv = nn.Conv2d(
                self.num_attention_heads,
                self.num_attention_heads,
                kernel_size=(config.conv_window, 1),
                padding=(config.conv_window // 2, 0),
                bias=False,
                groups=self.num_attention_heads,
            )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The context ``(batch, n, hidden)`` of ``hidden_states (batch, n, hidden)``, and the
        weights ``(batch, heads, n, n)`` that it was made with, for ``output_attentions``.
        ``attention_mask`` is bool ``(batch, n)``.
        """
        config = self.config
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mask = None if attention_mask is None else attention_mask[:, None, :]  # the heads share it
        signs, planes = (None, None) if config.use_expectation else self._draw(query.device)
        attend = yoso_attention_with_weights if output_attentions else yoso_attention
        found = attend(
            query,
            key,
            value,
            num_hash=config.num_hash,
            hash_code_len=config.hash_code_len,
            use_expectation=config.use_expectation,
            signs=signs,
            planes=planes,
            query_mask=mask,
            key_mask=mask,
            variant=config.kernel_variant,
            grad=config.grad,
            layout=config.hash_layout,
            rotations=config.rotations,
            oversample=config.oversample,
            backward="lsh" if config.lsh_backward else "expectation",
            backward_num_hash=config.backward_num_hash,
        )
        context, weights = found if isinstance(found, tuple) else (found, None)
        if config.conv_window is not None:
            context = context + self.conv(value if mask is None else value.masked_fill(~mask[..., None], 0))
        return context.transpose(1, 2).flatten(2), weights

    def _draw(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Signs or planes, or neither. Evaluation always gets the same ones. Training gets new ones
        from torch's generator: planes here, signs inside `yoso_attention`.
        """
        config, heads, dim = self.config, self.num_attention_heads, self.attention_head_size
        code_len = config.hash_code_len + config.oversample
        if self.training:
            return None, None if config.use_fast_hash else torch.randn(heads, dim, config.num_hash * code_len, device=device)
        draw = evaluation_draw(
            kind="signs" if config.use_fast_hash else "planes",
            hash_seed=config.hash_seed,
            layer=self.layer,
            num_heads=heads,
            num_hash=config.num_hash,
            hash_code_len=code_len,
            dim=dim,
            device=device,
            layout=config.hash_layout,
            rotations=config.rotations,
        )
        return (draw, None) if config.use_fast_hash else (None, draw)


class _AddAndNorm(nn.Module):
    """``LayerNorm(dropout(W x + b) + input)``, which ends both halves of a layer; ``x`` is
    ``(..., size)``.
    """

    def __init__(self, config: YosoConfig, size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return cast(Tensor, self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor))


class YosoSelfOutput(_AddAndNorm):
    """After the attention."""

    def __init__(self, config: YosoConfig) -> None:
        super().__init__(config, config.hidden_size)


class YosoAttention(nn.Module):
    def __init__(self, config: YosoConfig, layer: int = 0) -> None:
        super().__init__()
        self.self = YosoSelfAttention(config, layer)
        self.output = YosoSelfOutput(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        context, weights = self.self(hidden_states, attention_mask, output_attentions)
        return self.output(context, hidden_states), weights


class YosoIntermediate(nn.Module):
    def __init__(self, config: YosoConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.intermediate_act_fn(self.dense(hidden_states)))


class YosoOutput(_AddAndNorm):
    """After the feed-forward network."""

    def __init__(self, config: YosoConfig) -> None:
        super().__init__(config, config.intermediate_size)


class YosoLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention, then the feed-forward network. The network works in chunks of
    ``config.chunk_size_feed_forward`` tokens where that is not 0.
    """

    def __init__(self, config: YosoConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.attention = YosoAttention(config, layer)
        self.intermediate = YosoIntermediate(config)
        self.output = YosoOutput(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(hidden_states, attention_mask, output_attentions)
        return apply_chunking_to_forward(self.feed_forward_chunk, self.config.chunk_size_feed_forward, 1, attended), weights

    def feed_forward_chunk(self, attended: Tensor) -> Tensor:
        return cast(Tensor, self.output(self.intermediate(attended), attended))


class YosoEncoder(nn.Module):
    def __init__(self, config: YosoConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList([YosoLayer(config, i) for i in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """The hidden states of the last layer; with ``output_hidden_states`` those of all layers,
        the embeddings first; with ``output_attentions`` the weights of all layers.
        """
        states, weights = [hidden_states], []
        for layer in self.layer:
            hidden_states, layer_weights = layer(hidden_states, attention_mask, output_attentions)
            if output_hidden_states:
                states.append(hidden_states)
            if output_attentions:
                weights.append(layer_weights)
        return hidden_states, tuple(states) if output_hidden_states else None, tuple(weights) if output_attentions else None
