# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""One token per row through the layers of the decoder, with as few operations as there can be.

A token of a small model costs about as many microseconds as operations, and most of those that the layers run for a
token only shape its states or build again what the weights alone decide. [`DecoderStep`] builds that once for all
tokens of a generation. The layers' own forward is the slow truth, and runs wherever [`DecoderStep.of`] finds anything
out of the ordinary.

Shapes: B batch, N query heads, M key-value heads, G = N / M, H head size, D hidden size, S key slots.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .attention_flashlite import joint_weights, multi_axis_attention
from .cache_flashlite import FlashLiteCacheLayer, own_cache
from .ecq_modules_flashlite import join
from .int4_flashlite import TILE_ROWS
from .layers_flashlite import (
    LENGTH_ROPES,
    FlashLiteDecoderAttention,
    FlashLiteDecoderLayer,
    FlashLiteMLP,
    FlashLiteRMSNorm,
    position_angles,
    product_dtype,
    rotate,
)
from .linear_flashlite import Linear, is_hooked, linear

# positions whose angles are computed together
_ANGLES = 64


class Angles(NamedTuple):
    """Cosines and sines of one position `[H / 2]`, both in a row, and each twice, `[H]`; or tables of them."""

    cos: torch.Tensor
    sin: torch.Tensor
    both: torch.Tensor
    cos_twice: torch.Tensor
    sin_twice: torch.Tensor


class DecoderStep:
    """What the weights of a decoder decide for every token, and the step that uses it; got from [`DecoderStep.of`]."""

    def __init__(self, decoder, dtype: torch.dtype):
        self.decoder, self.dtype = decoder, dtype
        self.layers: list[LayerStep] = [LayerStep(layer) for layer in decoder.layers] if _is_plain(decoder) else []
        self._tables: Any = None
        config = decoder.config
        self.kinds = config.rope_kinds
        ropes = [
            config.rope_parameters if kind is None else config.rope_parameters[kind]
            for kind in set(self.kinds) - {"none"}
        ]
        by_length = any(rope["rope_type"] in LENGTH_ROPES for rope in ropes)
        self.positions = 1 if by_length else _ANGLES

    def __deepcopy__(self, memo):
        # a copy of a cache shares the weights
        return self

    @classmethod
    def of(cls, decoder, past_key_values, hidden_states: torch.Tensor, **kwargs) -> "DecoderStep | None":
        """The step for the newest tokens `[B, 1, D]` of a cache, or `None` where the layers have to run.

        The first tokens of a cache go through the layers; later ones find the step in the cache, where it lives no
        longer than keys that older weights made.
        """
        if past_key_values is None:
            return None
        own = own_cache(past_key_values)
        if not own.get_seq_length():
            own._step = None
            return None
        if (
            hidden_states.shape[1] != 1
            or decoder.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or product_dtype(hidden_states) != hidden_states.dtype
            or any(value for name, value in kwargs.items() if name.startswith("output_"))
        ):
            return None
        step = own.__dict__.get("_step")
        if step is None or step.decoder is not decoder or step.dtype != hidden_states.dtype:
            own._step = step = cls(decoder, hidden_states.dtype)
        return step if step._takes(past_key_values) else None

    def _takes(self, past_key_values) -> bool:
        """Whether all rows of the cache hold the same number of tokens, and it has the encoder's keys, if any."""
        own, layers = own_cache(past_key_values), len(self.layers)
        # fewer layers run while a draft exits early
        if not layers == len(own.layers) == self.decoder.config.num_hidden_layers or own.offloading:
            return False
        if own is not past_key_values and not all(map(past_key_values.is_updated.get, range(layers))):
            return False
        first = own.layers[0]
        alike = isinstance(first, FlashLiteCacheLayer) and isinstance(first.fill, int) and isinstance(first.base, int)
        return alike and first.mask is None

    def angles(self, position: int, like: torch.Tensor) -> "dict[str | None, Angles]":
        """The angles of one position for each kind of layer, from tables of some positions."""
        first, index = position - position % self.positions, position % self.positions
        if self._tables is None or self._tables[:2] != (first, like.device):
            positions = torch.arange(first, first + self.positions, device=like.device)[None]
            dtype = torch.promote_types(like.dtype, torch.float32)
            config, kinds = self.decoder.config, set(self.kinds)
            tables = {kind: _tables(*position_angles(config, positions, dtype, kind)) for kind in kinds}
            self._tables = first, like.device, tables
        return {kind: Angles(*(table[index] for table in tables)) for kind, tables in self._tables[2].items()}

    def __call__(self, hidden_states: torch.Tensor, past_key_values, encoder_mask, context) -> torch.Tensor:
        """States `[B, 1, D]` of the newest tokens before the layers -> after them; the cache grows in place.

        `encoder_mask` `[B, S]` belongs to the encoder's keys in the cache; `context` makes what the layers would
        share, which is needed only when the cache holds other encoder keys than before.
        """
        own, states = own_cache(past_key_values), hidden_states[:, 0]
        position = own.layers[0].base + own.layers[0].fill
        angles = self.angles(position, hidden_states)
        cross = own is not past_key_values
        for index, layer in enumerate(self.layers):
            encoder = layer.encoder_keys(past_key_values, encoder_mask, context) if cross else None
            states = layer(states, own.layers[index], angles[self.kinds[index]], encoder)
        return states[:, None]


def _tables(cos: torch.Tensor, sin: torch.Tensor) -> Angles:
    cos, sin = cos[0, 0], sin[0, 0]
    pairs = (cos, sin), (cos, cos), (sin, sin)
    return Angles(cos, sin, *(torch.cat(pair, dim=1) for pair in pairs))


def _is_plain(decoder) -> bool:
    """Whether nothing hangs on the modules whose forward is left out: hooks, shards, recorders, other classes."""
    config = decoder.config
    if config._attn_implementation != "sdpa" or config.output_attentions or config.output_hidden_states:
        return False
    for layer in decoder.layers:
        norms = _norms(layer)
        skipped = layer, layer.self_attn, layer.mlp, *norms
        classes = FlashLiteDecoderLayer, FlashLiteDecoderAttention, FlashLiteMLP
        if tuple(map(type, skipped[:3])) != classes or any(map(is_hooked, skipped)):
            return False
        if not {type(norm) for norm in norms} <= {nn.RMSNorm, FlashLiteRMSNorm, nn.Identity}:
            return False
        direct = [p for module in skipped for p in module.parameters(recurse=False)]
        if any(type(p) is not nn.Parameter or p.device.type == "meta" for p in direct):
            return False
    return not nn.modules.module._has_any_global_hook()


def _norms(layer: FlashLiteDecoderLayer) -> list[nn.Module]:
    """The four places of a norm in a layer, in their order."""
    names = "input_layernorm", "attention_output_norm", "post_attention_layernorm", "mlp_output_norm"
    return [getattr(layer, name) for name in names]


def _call(module: nn.Module):
    """What runs a layer: without its hooks' machinery, which costs microseconds, where nothing hangs on it."""
    if is_hooked(module):
        return module
    if type(module) in (nn.Linear, Linear):
        return functools.partial(linear, weight=module.weight, bias=module.bias)
    return module.forward


class LayerStep:
    """One layer of a [`DecoderStep`]."""

    def __init__(self, layer: FlashLiteDecoderLayer):
        attention = layer.self_attn
        self.attention, self.spec = attention, attention.spec
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.query_key_value = _together([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up = _together([layer.mlp.gate_proj, layer.mlp.up_proj])
        self.o, self.down = _call(attention.o_proj), _call(layer.mlp.down_proj)
        self.act = _call(layer.mlp.act_fn)
        self.norms = list(map(_norm_of, _norms(layer)))
        self.head_norms = _call(attention.q_norm), _call(attention.k_norm)
        self.multiplier = layer.residual_multiplier
        self.groups, self.is_rotary = attention.num_key_value_groups, attention.is_rotary
        self.query_map = None if self.is_rotary else self._query_map()
        self._encoder: Any = None

    @torch.no_grad()
    def _query_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias `[N, 1, 3 H]` and matrix `[N, H, 3 H]` that make content and both position terms of a scaled query.

        With `a, b` the halves of `W_R^T (q + v)`, the product is `[q + u | a, -b | b, a]`: its second part times the
        cosines plus its third times the sines are the dimensions that carry the position (see
        [`FlashLiteAttention`]).
        """
        attention = self.attention
        wide = torch.promote_types(attention.content_bias.dtype, torch.float32)
        content, position = attention.content_bias.to(wide), attention.position_bias.to(wide)
        weight = attention.relative_weight(attention.content_bias.new_empty(0)).to(wide)
        first, second = weight.chunk(2, dim=-1)
        unit = torch.eye(self.head_dim, dtype=wide, device=weight.device).expand_as(weight)
        turned = torch.cat([first, -second, second, first], dim=-1)
        bias = torch.cat([content[:, None], position[:, None] @ turned], dim=-1)
        return bias * self.scaling, torch.cat([unit, turned], dim=-1) * self.scaling

    def encoder_keys(self, past_key_values, mask: torch.Tensor | None, context) -> "EncoderKeys":
        """The encoder's keys and values in the cache, made ready once for all tokens that find the same ones."""
        layer = past_key_values.cross_attention_cache.layers[self.attention.layer_idx]
        ready = self._encoder
        if ready is None or ready.source is not layer.keys or ready.mask is not mask:
            key, value = self.attention._encoder_keys(None, context(), past_key_values)
            self._encoder = ready = EncoderKeys(layer.keys, mask, key, value, getattr(layer, "sources", None))
        return ready

    def __call__(self, states, cache, angles: Angles, encoder: "EncoderKeys | None") -> torch.Tensor:
        """States `[B, D]` -> `[B, D]`."""
        before, after, before_mlp, after_mlp = self.norms
        query, key, value = self.query_key_value(before(states))
        query = self._query(self.head_norms[0](query), angles)
        batch = states.shape[0]
        key = self.head_norms[1](key).view(batch, -1, 1, self.head_dim)
        value = value.view(key.shape)
        if self.is_rotary:
            key = rotate(key, angles.cos, angles.sin)
        else:
            key = torch.cat([key, angles.both.to(key.dtype).expand(key.shape)], dim=-1)
        keys, values = cache.update(key, value)
        attended = self._attend(query, keys, values, cache, encoder).reshape(batch, -1)
        states = torch.add(states, after(self.o(attended.to(states.dtype))), alpha=self.multiplier)
        gate, up = self.gate_up(before_mlp(states))
        return torch.add(states, after_mlp(self.down(self.act(gate) * up)), alpha=self.multiplier)

    def _query(self, projected: torch.Tensor, angles: Angles) -> torch.Tensor:
        """Scaled queries with their positions, `[B, N H]` -> `[B M, G, H or 2 H]`."""
        size, batch = self.head_dim, projected.shape[0]
        if self.is_rotary:
            query = rotate(projected.view(batch, -1, 1, size), angles.cos, angles.sin) * self.scaling
            return query.view(-1, self.groups, size).to(torch.promote_types(query.dtype, torch.float32))
        bias, matrix = self.query_map
        # the heads are the batch of the product
        rows = projected.view(batch, -1, size).transpose(0, 1).to(matrix.dtype)
        query = torch.baddbmm(bias, rows, matrix)
        query.narrow(2, size, size).mul_(angles.cos_twice).addcmul_(query.narrow(2, 2 * size, size), angles.sin_twice)
        return query.narrow(2, 0, 2 * size).transpose(0, 1).reshape(-1, self.groups, 2 * size)

    def _attend(self, query, keys, values, cache, encoder) -> torch.Tensor:
        """Scaled queries `[B M, G, H or 2 H]` over the slots of cache and encoder: `[B M, G, H]` or `[B, N, 1, H]`."""
        spec, start = self.spec, cache.start
        reach = start // spec.block_size - 1
        within = spec.relevance_top_k is None or reach <= spec.relevance_top_k
        if not within or (spec.memory_blocks is not None and reach >= spec.memory_blocks):
            rows = query.view(len(keys), -1, 1, query.shape[2])
            cross = None if encoder is None else encoder.cross
            settings = {"start": start, "scaling": 1.0, "summaries": cache.summaries}
            return multi_axis_attention(rows, keys, values, spec, cross=cross, **settings)
        keys, values = (states.flatten(0, 1).to(query.dtype) for states in (keys, values))
        logits = torch.bmm(query, keys.mT)
        if encoder is None:
            return torch.bmm(logits.softmax(2), values)
        own, other = joint_weights([logits, encoder.logits(query)])
        return encoder.attend(other, torch.bmm(own, values))


def _together(layers: list[nn.Module]) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """A function that gives the outputs of several layers of the same input: by one product, where they are codes."""
    joint = None if any(map(is_hooked, layers)) else join(layers)
    if joint is None:
        calls = list(map(_call, layers))
        return lambda states: [call(states) for call in calls]
    starts = itertools.accumulate((len(layer.tiles) * TILE_ROWS for layer in layers), initial=0)
    places = [(1, start, layer.out_features) for start, layer in zip(starts, layers)]

    def product(states: torch.Tensor) -> list[torch.Tensor]:
        output = joint.forward(states)
        return [output.narrow(*place) for place in places]

    return product


class EncoderKeys:
    """The encoder's keys `[B, M, S, H or 2 H]` and values `[B, M, S, H]` of one layer, ready for a step.

    `source` and `mask` tell which keys of the cache and which mask they were made from, `sources` which rows hold the
    same (see [`EncoderCacheLayer`]): the queries of such rows, `beams` of them side by side, meet their keys together.
    """

    def __init__(self, source, mask, key, value, sources=None):
        self.source, self.mask = source, mask
        seen = None if mask is None or mask.all() else mask.bool()
        self.cross = key, value, seen
        wide = torch.promote_types(key.dtype, torch.float32)
        self.beams, self.heads = _beams(sources, seen), key.shape[1]
        key, value = key[:: self.beams], value[:: self.beams]
        seen = None if seen is None else seen[:: self.beams]
        self.keys = key.flatten(0, 1).to(wide).mT.contiguous()
        self.values = value.flatten(0, 1).to(wide)
        self.bias = None
        if seen is not None:
            hidden = torch.zeros(seen.shape, dtype=wide, device=seen.device).masked_fill_(~seen, -math.inf)
            self.bias = hidden.repeat_interleave(key.shape[1], dim=0)[:, None]

    def logits(self, query: torch.Tensor) -> torch.Tensor:
        """`[B M, G, S]` of scaled queries `[B M, G, H or 2 H]`."""
        query = self._together(query)
        if self.bias is None:
            return self._apart(torch.bmm(query, self.keys))
        return self._apart(torch.baddbmm(self.bias, query, self.keys))

    def attend(self, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add the values under the weights `[B M, G, S]` to `out` `[B M, G, H]`."""
        if self.beams == 1:
            return torch.baddbmm(out, weights, self.values)
        return out.add_(self._apart(torch.bmm(self._together(weights), self.values)))

    def _together(self, rows: torch.Tensor) -> torch.Tensor:
        """`[B M, G, X]` -> `[B / beams M, beams G, X]`."""
        if self.beams == 1:
            return rows
        split = rows.view(-1, self.beams, self.heads, *rows.shape[1:])
        return split.transpose(1, 2).reshape(len(self.values), -1, rows.shape[2])

    def _apart(self, rows: torch.Tensor) -> torch.Tensor:
        """`[B / beams M, beams G, X]` -> `[B M, G, X]`."""
        if self.beams == 1:
            return rows
        split = rows.view(-1, self.heads, self.beams, rows.shape[1] // self.beams, rows.shape[2])
        return split.transpose(1, 2).reshape(len(rows) * self.beams, -1, rows.shape[2])


def _beams(sources: torch.Tensor | None, mask: torch.Tensor | None) -> int:
    """How many rows, side by side and everywhere as many, have the same source and mask; 1 if it is not so.

    1 for a single source too: its keys are read again in less time than queries and weights take to be moved.
    """
    count = 1 if sources is None else len(sources.unique())
    if sources is None or count == 1:
        return 1
    beams, odd = divmod(len(sources), count)
    alike = [states.unflatten(0, (-1, beams)) for states in (sources, mask) if states is not None and not odd]
    return beams if alike and all(bool((states == states[:, :1]).all()) for states in alike) else 1


def _norm_of(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm of a module as a function of `[B, D]`, in half of the time of the operator for one token.

    `x w / sqrt(mean(x^2) + eps) = x (sqrt(D) w) / hypot(|x|, sqrt(D eps))`.
    """
    if type(module) is nn.Identity:
        return module.forward
    wide = torch.promote_types(module.weight.dtype, torch.float32)
    size = module.normalized_shape[0]
    eps = torch.finfo(module.weight.dtype).eps if module.eps is None else module.eps
    weight = (module.weight.detach().to(wide) + getattr(module, "offset", 0.0)) * size**0.5
    floor = module.weight.new_tensor((size * eps) ** 0.5, dtype=wide)

    def norm(states: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(states, 2, -1, True, dtype=wide)
        return (states * weight).div_(torch.hypot(length, floor)).to(states.dtype)

    return norm
