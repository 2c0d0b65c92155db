# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""The layers of Flash-Lite: positions, attention, lite feed-forward network.

Shapes: B batch, R rows, T target columns, S source columns or key slots, N query heads, M key-value heads, H head
size, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_dense_flashlite import dense_attention
from .attention_flashlite import multi_axis_attention, multi_axis_attention_reference
from .cache_flashlite import FlashLiteCache, axis_spec, own_cache
from .configuration_flashlite import FlashLiteDecoderConfig, FlashLiteEncoderConfig
from .linear_flashlite import Linear
from .positions_flashlite import nearer, rotate
from .rows_flashlite import Rows


def product_dtype(states: torch.Tensor) -> torch.dtype:
    """The dtype for matrix products of `states`; a tensor that several products read is cast to it once.

    Autocast would cast it for each of them.
    """
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


class FlashLiteMLP(nn.Module):
    """The lite feed-forward network: `down(act(gate(x)) * up(x))`, 4/3 D wide, half of the usual parameters."""

    SISTERS = "gate_proj", "up_proj"  # a decode session computes them in one product; see `ecq_modules_flashlite.join`

    def __init__(self, config):
        super().__init__()
        size, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(size, width, bias=bias)
        self.up_proj = Linear(size, width, bias=bias)
        self.down_proj = Linear(width, size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., D]` -> `[..., D]`."""
        hidden_states = hidden_states.to(product_dtype(hidden_states))
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(self.act_fn(gate) * up)


class FlashLiteRMSNorm(nn.RMSNorm):
    """`x (w + offset) / sqrt(mean(x^2) + eps)` of each run of `size` dimensions of `[..., n size]`.

    The norms of queries and keys take runs of a head; a model whose norms have an offset (Gemma 3) takes one run.
    """

    def __init__(self, size: int, config):
        super().__init__(size, eps=config.rms_norm_eps)
        self.offset = config.rms_norm_offset

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        runs = states.to(wide).unflatten(-1, (-1, *self.normalized_shape))
        weight = self.weight.to(wide) + self.offset
        return nn.functional.rms_norm(runs, self.normalized_shape, weight, self.eps).flatten(-2).to(states.dtype)


def state_norm(config) -> nn.RMSNorm:
    """The norm of states `[..., D]`."""
    if config.rms_norm_offset:
        return FlashLiteRMSNorm(config.hidden_size, config)
    return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def head_norm(config, heads: int) -> nn.Module:
    """The norm of queries or keys `[..., N H]` before their positions; an identity where there is none."""
    if config.qk_norm is None:
        return nn.Identity()
    return FlashLiteRMSNorm(config.head_dim * (heads if config.qk_norm == "projection" else 1), config)


class FlashLiteAttention(nn.Module):
    """Projections and positions, common to both stacks.

    Every position encoding is expressed as one dot product of a query and a key, so that axes, kernels and cache are
    the same for all of them:

    - `rotary`: `(R_t q) . (R_s k)`;
    - `transformer_xl`: the four terms `(q + u) . k + (q + v) . W_R r_{t-s}` of https://huggingface.co/papers/1901.02860.
      With `r_d = [cos(w d), sin(w d)]` and `a, b` the halves of `W_R^T (q + v)`, the addition theorems give
      `(q + v) . W_R r_{t-s} = [a cos wt + b sin wt, a sin wt - b cos wt] . [cos ws, sin ws]`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.is_causal = config.is_decoder
        width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = Linear(config.hidden_size, width, bias=bias)
        self.k_proj = Linear(config.hidden_size, key_width, bias=bias)
        self.v_proj = Linear(config.hidden_size, key_width, bias=bias)
        self.o_proj = Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = head_norm(config, config.num_attention_heads)
        self.k_norm = head_norm(config, config.num_key_value_heads)
        self.is_rotary = config.position_encoding == "rotary"
        if not self.is_rotary:
            self.r_proj = Linear(config.head_dim, width, bias=False)
            self.content_bias = nn.Parameter(torch.zeros(config.num_attention_heads, config.head_dim))
            self.position_bias = nn.Parameter(torch.zeros(config.num_attention_heads, config.head_dim))

    def relative_weight(self, like: torch.Tensor) -> torch.Tensor:
        """`W_R` as one matrix per head, `[N, H, H]`, in the type of `like`; there is none for rotary positions."""
        # called as a module, so that adapters, quantizers and sharding of `r_proj` apply: r_proj(1) = W_R^T
        weight = self.r_proj(torch.eye(self.head_dim, dtype=like.dtype, device=like.device))
        return weight.view(self.head_dim, -1, self.head_dim).permute(1, 2, 0).contiguous()

    def queries(self, hidden_states: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]):
        """Queries with their positions, `[B, T, D]` -> `[B, N, T, H or 2 H]`."""
        query = self.q_norm(self.q_proj(hidden_states))
        query = query.view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)
        if self.is_rotary:
            return rotate(query, *angles)
        weight = self.relative_weight(query)
        content_bias, position_bias = self.content_bias.to(query.dtype), self.position_bias.to(query.dtype)
        # heads as the batch dimension: one product of all rows per head
        rows = (query + position_bias[:, None]).transpose(0, 1)
        relative = torch.bmm(rows.flatten(1, 2), weight).view(rows.shape).transpose(0, 1)
        (cos, sin), (first, second) = angles, relative.chunk(2, dim=-1)
        content = query + content_bias[:, None]
        return torch.cat([content, first * cos + second * sin, first * sin - second * cos], dim=-1)

    def keys_values(self, hidden_states: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]):
        """Keys with their positions and values, `[B, S, D]` -> `[B, M, S, H or 2 H]` and `[B, M, S, H]`."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        key = self.k_norm(self.k_proj(hidden_states)).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.is_rotary:
            return rotate(key, *angles), value
        return torch.cat([key, torch.cat(angles, dim=-1).expand(*key.shape[:3], -1)], dim=-1), value


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention with explicit weights: the reference for the encoder's attention."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = nn.functional.softmax(logits, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = weights.to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class FlashLiteEncoderAttention(FlashLiteAttention):
    """Dense bidirectional attention."""

    def forward(self, hidden_states, angles, attention_mask=None):
        """`[B, S, D]` -> `[B, S, D]` and the weights `[B, N, S, S]`, where the implementation gives them."""
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        hidden_states = hidden_states.to(product_dtype(hidden_states))
        query, (key, value) = self.queries(hidden_states, angles), self.keys_values(hidden_states, angles)
        if self.config._attn_implementation == "sdpa":
            weights, out = None, dense_attention(query, key, value, attention_mask, scaling=self.scaling)
            out = out.transpose(1, 2)
        else:
            out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class FlashLiteDecoderAttention(FlashLiteAttention):
    """Multi-axis attention over the row's own past, with the encoder's keys in the same softmax (merged attention)."""

    SISTERS = "q_proj", "k_proj", "v_proj"  # as in [`FlashLiteMLP`]

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.spec = axis_spec(config)

    def forward(self, hidden_states, encoder_hidden_states, angles, context: "DecoderContext"):
        """`[B, T, D]` -> `[B, T, D]`, the weights of decoder keys `[B, N, T, S]` and those of encoder keys."""
        hidden_states = hidden_states.to(product_dtype(hidden_states))
        query, (key, value) = self.queries(hidden_states, angles), self.keys_values(hidden_states, angles)
        first_query = None
        if context.shift_angles is not None:
            first_query = nearer(query, *context.shift_angles[self.layer_idx])
        column_value, rows, eager = value, context.rows, self.config._attn_implementation == "eager"
        if rows is not None and rows.parts and not eager:
            out = self._by_length(query, key, value, first_query, rows.parts)
            return self.o_proj(out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None, None
        if rows is not None:
            query, key, value = rows.gather(query), rows.gather(key), rows.gather(value)
            first_query = None if first_query is None else rows.gather(first_query)
        key, value, start, summaries = context.extend(self.layer_idx, key, value)
        cross = context.encoder_keys(self, encoder_hidden_states)
        settings = {"start": start, "scaling": self.scaling, "cross": cross, "first_query": first_query}
        weights = cross_weights = None
        if eager:
            out, weights, cross_weights = multi_axis_attention_reference(query, key, value, self.spec, **settings)
        else:
            out = multi_axis_attention(query, key, value, self.spec, summaries=summaries, **settings)
        if rows is not None:
            out, weights, cross_weights = (x if x is None else rows.scatter(x) for x in (out, weights, cross_weights))
        if weights is not None and context.memory is None:
            out, weights = self._by_column(out, weights, cross_weights, column_value, cross, context)
        return self.o_proj(out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), weights, cross_weights

    def _by_length(self, query, key, value, first_query, parts: Sequence[Rows]):
        """Attention of packed documents, those of alike lengths at a time; they have no past and no encoder."""
        out = torch.zeros_like(query[..., : value.shape[-1]])
        for rows in parts:
            first = None if first_query is None else rows.gather(first_query)
            operands = rows.gather(query), rows.gather(key), rows.gather(value)
            out = out + rows.scatter(
                multi_axis_attention(*operands, self.spec, scaling=self.scaling, first_query=first)
            )
        return out

    def _by_column(self, out, weights, cross_weights, value, cross, context):
        """Reorder weights over row slots `[B, N, T, S]` to the order of the columns, if these differ.

        The output is recomputed from them, so that a gradient with respect to the returned weights exists.
        """
        source, past = context.rows, context.past_key_values
        if past is not None:
            source = own_cache(past).layers[self.layer_idx]
            source, value = (None, value) if source.mask is None else (source, source.values)
        if source is None:
            return out, weights
        slot, real = source.column_slots()
        weights = weights.gather(3, slot[:, None, None, :].expand(-1, *weights.shape[1:3], -1))
        weights = weights.masked_fill(~real[:, None], 0.0)
        out = weights @ value.repeat_interleave(self.num_key_value_groups, dim=1)
        if cross is not None:
            out = out + cross_weights @ cross[1].repeat_interleave(self.num_key_value_groups, dim=1)
        return out, weights


@dataclass
class DecoderContext:
    """State shared by all layers in one decoder forward.

    `rows` maps padded or packed columns to rows (`None` where every column is real), `past_key_values` is the cache
    (here, since checkpointed layers drop an argument of that name), `memory` the segment memory before this segment,
    and `next_memory` receives the one after it (written again, with equal values, when a checkpointed layer is
    recomputed). `shift_angles` of each layer are the angles of [`first_block_shift`] (`None` without a shift).
    `encoder_mask` `[B, S]` belongs to the encoder's keys. Until these are computed, `encoder_angles` are the angles of
    the states passed to the layers, and `sources` `[B]` is the state that each row reads (`None`: its own).
    """

    rows: Rows | None = None
    past_key_values: EncoderDecoderCache | FlashLiteCache | None = None
    memory: FlashLiteCache | None = None
    next_memory: FlashLiteCache | None = None
    shift_angles: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    encoder_angles: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    encoder_mask: torch.Tensor | None = None
    sources: torch.Tensor | None = None

    @property
    def past(self) -> FlashLiteCache | None:
        """The past of the rows: the decoder's part of the cache, or the segment memory."""
        return self.memory if self.past_key_values is None else own_cache(self.past_key_values)

    def extend(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor):
        """All keys and values of the rows, new ones last; the slot of the first new one; and summaries, if any."""
        if self.past is None:
            return key, value, 0, None
        layer = self.past.layers[layer_idx]
        if self.past_key_values is not None:
            key, value = self.past.update(key, value, layer_idx, self.rows)
            return key, value, layer.start, layer.summaries
        key, value, extended = layer.extend(key, value, self.rows)
        if self.next_memory is not None:
            self.next_memory.layers[layer_idx] = extended
        return key, value, layer.fill, None

    def encoder_keys(self, attention: FlashLiteAttention, states: torch.Tensor | None):
        """Keys and values of the encoder's states `[U, S, D]` and their mask; computed once if a cache keeps them."""
        if states is None:
            return None
        past, index = self.past_key_values, attention.layer_idx
        if not isinstance(past, EncoderDecoderCache):
            return *attention.keys_values(states, self.encoder_angles[index]), self.encoder_mask
        layer = past.cross_attention_cache.layers[index]
        if not past.is_updated.get(index):
            key, value = attention.keys_values(states, self.encoder_angles[index])
            if self.sources is not None:
                key, value = key[self.sources], value[self.sources]
            past.cross_attention_cache.update(key, value, index)
            past.is_updated[index], layer.sources = True, self.sources
        return layer.whole, layer.values, self.encoder_mask


def equal_sources(states: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find rows of an encoder's states `[B, S, D]` and their mask `[B, S]` that repeat the previous row, as beams do.

    Returns:
        The first row of each source, `[U]`, and the source index of each row, `[B]`; `None` if all differ.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    again = (states[1:, 0] == states[:-1, 0]).all(1)
    if not again.any():
        return None
    again &= (states[1:] == states[:-1]).flatten(1).all(1)
    if mask is not None:
        again &= (mask[1:] == mask[:-1]).all(1)
    fresh = nn.functional.pad(~again, (1, 0), value=True)
    return fresh.nonzero()[:, 0], fresh.cumsum(0) - 1


class FlashLiteLayer(GradientCheckpointingLayer):
    """`x += r norm(attention(norm(x)))`, `x += r norm(mlp(norm(x)))`, common to both stacks.

    The norms are before or after the branches (`norm_placement`); r is `residual_multiplier`.
    """

    def __init__(self, config, attention: FlashLiteAttention):
        super().__init__()
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.input_layernorm = state_norm(config) if before else nn.Identity()
        self.self_attn = attention
        self.attention_output_norm = state_norm(config) if after else nn.Identity()
        self.post_attention_layernorm = state_norm(config) if before else nn.Identity()
        self.mlp = FlashLiteMLP(config)
        self.mlp_output_norm = state_norm(config) if after else nn.Identity()
        self.dropout = nn.Dropout(config.dropout_rate)
        self.residual_multiplier = config.residual_multiplier

    def add_branches(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """States `[..., D]` before the layer and its attention output -> states after the layer."""
        hidden_states = self._add(hidden_states, self.attention_output_norm(attended))
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        return self._add(hidden_states, self.mlp_output_norm(output))

    def _add(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return torch.add(hidden_states, self.dropout(branch), alpha=self.residual_multiplier)


class FlashLiteEncoderLayer(FlashLiteLayer):
    """A layer of the dense encoder."""

    def __init__(self, config: FlashLiteEncoderConfig, layer_idx: int):
        super().__init__(config, FlashLiteEncoderAttention(config, layer_idx))

    def forward(self, hidden_states, angles, attention_mask=None):
        """`[B, S, D]` -> `[B, S, D]`."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), angles, attention_mask)
        return self.add_branches(hidden_states, attended)


class FlashLiteDecoderLayer(FlashLiteLayer):
    """A layer of the sparse decoder; with and without an encoder."""

    def __init__(self, config: FlashLiteDecoderConfig, layer_idx: int):
        super().__init__(config, FlashLiteDecoderAttention(config, layer_idx))

    def forward(self, hidden_states, encoder_hidden_states, angles, context: DecoderContext):
        """`[B, T, D]` -> `[B, T, D]`."""
        attended, _, _ = self.self_attn(self.input_layernorm(hidden_states), encoder_hidden_states, angles, context)
        return self.add_branches(hidden_states, attended)
