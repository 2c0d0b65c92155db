# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""One token of each row through one decoder layer, in few operations; see `decode_flashlite`, which owns the steps.

Shapes: B batch, N query heads, M key-value heads, G = N / M, H head size, D hidden size, S key slots.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .attention_dense_flashlite import joint_weights
from .attention_flashlite import multi_axis_attention
from .cache_flashlite import EncoderCacheLayer, FlashLiteCacheLayer
from .ecq_modules_flashlite import EcqLinear, join
from .int4_flashlite import KernelWeight, int4_few_rows, spread
from .layers_flashlite import FlashLiteDecoderLayer
from .linear_flashlite import Linear, is_hooked, linear
from .positions_flashlite import nearer
from .tiles_flashlite import TILE_ROWS
from .working_set_flashlite import WorkingSet, fits_working_set


class Angles(NamedTuple):
    """Cosines and sines of the new position as a token needs them; tables of positions have them along one axis more.

    For rotary positions `cos` and `sin` are `[N + M, H]`, for queries and keys together: sines have the sign of their
    half, and the rows of queries are scaled. Else they are `[H]`, each twice, and `both` `[H]` has them in a row.
    Where rows of the batch are at different positions, all of them have an axis of rows before.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    both: torch.Tensor


class Place(NamedTuple):
    """Where the new tokens stand, the same in all layers.

    Attributes:
        angles (`dict`): [`Angles`] of each kind of layer.
        shift: angles of each layer of how much nearer the first block seems, `None` where it does not.
        bias (`torch.Tensor` `[B M, 1, S]`, *optional*): -inf at slots that a row has not reached, where rows differ.
        few: whether the rows are few enough for the int4 kernel.
    """

    few: bool
    angles: dict[str | None, Angles]
    shift: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    bias: torch.Tensor | None = None


def norms_of(layer: FlashLiteDecoderLayer) -> list[nn.Module]:
    """The four places of a norm in a layer, in their order."""
    names = "input_layernorm", "attention_output_norm", "post_attention_layernorm", "mlp_output_norm"
    return [getattr(layer, name) for name in names]


def _call(module: nn.Module):
    """What runs a module: its forward, without the machinery for hooks where there are none."""
    if is_hooked(module):
        return module
    if type(module) in (nn.Linear, Linear):
        return functools.partial(linear, weight=module.weight, bias=module.bias)
    return module.forward


def _branch_end(module: nn.Module, dtype: torch.dtype) -> Callable[[torch.Tensor, bool], torch.Tensor]:
    """What runs the last layer of a branch on states `[B, K]`, which may be few; its output is of `dtype`."""
    if not _is_coded(module) or is_hooked(module):
        run = _call(module)
        return lambda states, few: run(states.to(dtype))
    kernel, size = module.prepared(), module.out_features
    if not _is_whole(kernel, size) or dtype != torch.bfloat16:

        def general(states: torch.Tensor, few: bool) -> torch.Tensor:
            states = states.to(dtype)
            return int4_few_rows(states, kernel, size) if few else module.forward(states)

        return general

    def product(states: torch.Tensor, few: bool) -> torch.Tensor:
        if not few:
            return module.forward(states.to(dtype))
        # attention's output comes in float32: one cast, after the factors
        return kernel.product(spread(states, kernel.numbers, kernel.factors).to(dtype))

    return product


def _is_whole(kernel: KernelWeight, size: int) -> bool:
    """Whether a weight is of PyTorch's kernel, and has no rows beyond `size`."""
    return type(kernel) is KernelWeight and len(kernel.packed) == size


def _is_coded(module: nn.Module) -> bool:
    """Whether a layer is nothing but a product with codes on the CPU."""
    coded = type(module) is EcqLinear and module.tiles is not None and module.tiles.is_cpu
    return coded and module.bias is None and not module.step.requires_grad


def _together(
    norm: nn.Module, groups: list[list[nn.Module]]
) -> Callable[[torch.Tensor, bool], Sequence[torch.Tensor]]:
    """The outputs of layers that read the same norm of `[B, D]`, those of a group in a row: one product for codes.

    The weight of the norm is folded into what coded layers multiply their inputs by. The function takes states and
    whether they are few (see [`is_few_rows`]).
    """
    normalize, layers = _norm_of(norm), [layer for group in groups for layer in group]
    joint = None if any(map(is_hooked, layers)) else join(layers)
    if joint is None:
        calls = [[_call(layer) for layer in group] for group in groups]

        def apart(states: torch.Tensor, few: bool) -> list[torch.Tensor]:
            states = normalize(states)
            return [_in_a_row([call(states) for call in group]) for group in calls]

        return apart
    folds = _is_coded(joint) and isinstance(norm, nn.RMSNorm) and type(joint.prepared()) is KernelWeight
    normed = _few_normed_rows(norm, joint) if folds else None
    places = _places(groups)
    sizes = [group[0][2] for group in places]
    has_gaps = sum(sizes) < joint.out_features

    def product(states: torch.Tensor, few: bool) -> Sequence[torch.Tensor]:
        output = normed(states) if few and normed is not None else joint.forward(normalize(states))
        if not has_gaps:
            return output.split_with_sizes(sizes, 1)
        return [_in_a_row([output.narrow(*place) for place in group]) for group in places]

    return product


def _places(groups: list[list[nn.Module]]) -> list[list[tuple[int, int, int]]]:
    """Where the outputs of each group stand in those of the joint layer, one place for outputs without a gap."""
    places, start = [], 0
    for group in groups:
        found: list[tuple[int, int, int]] = []
        for layer in group:
            size = layer.out_features
            if found and sum(found[-1][1:]) == start:
                found[-1] = 1, found[-1][1], found[-1][2] + size
            else:
                found.append((1, start, size))
            start += len(layer.tiles) * TILE_ROWS
        places.append(found)
    return places


def _in_a_row(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _few_normed_rows(norm: nn.RMSNorm, layer: EcqLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    """`layer(norm(x))` of few rows `[B, D]`, the norm's weight and the layer's factors being multiplied as one."""
    kernel, (weight, floor) = layer.prepared(), _norm_weight(norm)
    numbers, weight = kernel.numbers, spread(weight, kernel.numbers, kernel.factors)

    def product(states: torch.Tensor) -> torch.Tensor:
        rows, dtype = states.to(weight.dtype), states.dtype
        length = torch.hypot(torch.linalg.vector_norm(rows, 2, -1, True), floor)
        rows = (rows if numbers is None else rows.index_select(1, numbers)) * weight
        return kernel.product(rows.div_(length).to(torch.bfloat16)).to(dtype)

    return product


class LayerStep:
    """One layer of a [`DecodeSession`]: constants of its weights, and what its cache holds in the form of a token."""

    def __init__(self, layer: FlashLiteDecoderLayer, index: int, kind: str | None, dtype: torch.dtype):
        attention, self.index, self.kind = layer.self_attn, index, kind
        self.attention, self.spec = attention, attention.spec
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        before, after, before_mlp, after_mlp = norms_of(layer)
        self.heads_and_values = _together(before, [[attention.q_proj, attention.k_proj], [attention.v_proj]])
        self.gate_up = _together(before_mlp, [[layer.mlp.gate_proj], [layer.mlp.up_proj]])
        self.o, self.down = _branch_end(attention.o_proj, dtype), _branch_end(layer.mlp.down_proj, dtype)
        self.act = _call(layer.mlp.act_fn)
        self.after, self.after_mlp = _norm_of(after), _norm_of(after_mlp)
        self.head_norms = (
            None if type(attention.q_norm) is nn.Identity else (_call(attention.q_norm), _call(attention.k_norm))
        )
        self.width = attention.config.num_attention_heads * self.head_dim
        self.multiplier = layer.residual_multiplier
        self.groups, self.is_rotary = attention.num_key_value_groups, attention.is_rotary
        self.query_map = None if self.is_rotary else self._query_map()
        self._encoder: EncoderKeys | None = None
        self._working: WorkingSet | None = None
        self._version: int | None = None

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

    def encoder_keys(self, layer: EncoderCacheLayer, mask: torch.Tensor | None) -> "EncoderKeys":
        """The encoder's keys and values in the cache, made ready once for each version of them."""
        ready = self._encoder
        if ready is None or ready.made_from[0] is not layer or ready.made_from[1:] != (layer.version, id(mask)):
            self._encoder = ready = EncoderKeys(layer, mask)
        return ready

    def __call__(
        self, states: torch.Tensor, cache: FlashLiteCacheLayer, place: Place, encoder: "EncoderKeys | None" = None
    ) -> torch.Tensor:
        """States `[B, D]` of the newest tokens -> `[B, D]`; the cache grows in place."""
        few = place.few
        heads, value = self.heads_and_values(states, few)
        batch, angles = states.shape[0], place.angles[self.kind]
        query, key = self._turn(heads, angles)
        value = value.view(batch, -1, 1, self.head_dim)
        slots = cache.update(key, value)
        first = None if place.shift is None else nearer(query[None], *place.shift[self.index])[0]
        if first is None and self.spec.is_dense((slots[0].shape[2] - 1) // self.spec.block_size):
            attended = self._attend_densely(query, slots, place.bias, encoder)
        else:
            attended = self._attend(query, slots, cache, encoder, first)
        attended = self.o(attended.reshape(batch, -1), few)
        states = torch.add(states, self.after(attended), alpha=self.multiplier)
        gate, up = self.gate_up(states, few)
        return torch.add(states, self.after_mlp(self.down(self.act(gate).mul_(up), few)), alpha=self.multiplier)

    def _turn(self, heads: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled queries `[B M, G, H or 2 H]` and keys `[B, M, 1, H or 2 H]` with their positions.

        From queries and keys in a row, `[B, (N + M) H]`; queries are of the type of the computation.
        """
        size, batch, width = self.head_dim, heads.shape[0], self.width
        if self.head_norms is not None:
            parts = heads.narrow(1, 0, width), heads.narrow(1, width, heads.shape[1] - width)
            heads = torch.cat([norm(part) for norm, part in zip(self.head_norms, parts)], dim=1)
        if self.query_map is None:
            # the pairs of queries and keys turn together: x [cos, cos] + [second, first] [-sin, sin]
            heads = heads.to(angles.cos.dtype).view(batch, -1, size)
            heads = torch.addcmul(heads * angles.cos, heads.roll(size // 2, 2), angles.sin)
            count = width // size
            query, key = heads.narrow(1, 0, count), heads.narrow(1, count, heads.shape[1] - count)
            return query.reshape(-1, self.groups, size), key.unsqueeze(2)
        query, key = heads.narrow(1, 0, width), heads.narrow(1, width, heads.shape[1] - width)
        key = key.view(batch, -1, 1, size)
        key = torch.cat([key, angles.both.to(key.dtype).view(-1, 1, 1, size).expand(key.shape)], dim=-1)
        bias, matrix = self.query_map
        # the heads are the batch of the product
        rows = query.view(batch, -1, size).transpose(0, 1).to(matrix.dtype)
        query = torch.baddbmm(bias, rows, matrix)
        query.narrow(2, size, size).mul_(angles.cos).addcmul_(query.narrow(2, 2 * size, size), angles.sin)
        return query.narrow(2, 0, 2 * size).transpose(0, 1).reshape(-1, self.groups, 2 * size), key

    @staticmethod
    def _attend_densely(query, slots, bias, encoder) -> torch.Tensor:
        """Scaled queries `[B M, G, H or 2 H]` over all slots of cache and encoder: `[B M, G, H]`."""
        keys, values = (states.flatten(0, 1).to(query.dtype) for states in slots)
        logits = torch.bmm(query, keys.mT) if bias is None else torch.baddbmm(bias, query, keys.mT)
        if encoder is None:
            return torch.bmm(logits.softmax(2), values)
        own, other = joint_weights([logits, encoder.logits(query)])
        return torch.baddbmm(torch.bmm(own, values), other, encoder.values)

    def _attend(self, query, slots, cache, encoder, first) -> torch.Tensor:
        """Scaled queries `[B M, G, H or 2 H]` over the slots that they choose: `[B M, G, H]` or `[B, N, 1, H]`.

        `first` are the queries of the first block, where they are others.
        """
        keys, values = slots
        start, cross = cache.start, None if encoder is None else encoder.cross
        if isinstance(start, int):
            working = self._working_set(keys, values, cache, cross)
            if working is not None:
                return working.attend(query, keys, values, start, first)
        rows, first = (x if x is None else x.view(len(keys), -1, 1, query.shape[2]) for x in (query, first))
        if not isinstance(start, int):  # paths for rows of several lengths take one type
            rows, first = (x if x is None else x.to(keys.dtype) for x in (rows, first))
        settings = {"start": start, "scaling": 1.0, "first_query": first, "summaries": cache.summaries}
        return multi_axis_attention(rows, keys, values, self.spec, cross=cross, **settings)

    def _working_set(self, keys, values, cache: FlashLiteCacheLayer, cross) -> WorkingSet | None:
        """The working set of the newest token's block; `None` where it would not pay."""
        block, changed = cache.start // self.spec.block_size, self._version not in (None, cache.version)
        self._version = cache.version
        if changed or (self._working is not None and self._working.block != block):
            self._working = None
        if changed or cache.summaries is None or not fits_working_set(keys, values, self.spec, cache.start):
            return None
        if self._working is None:
            self._working = WorkingSet(keys, values, self.spec, block, cache.summaries, cross)
        return self._working


class EncoderKeys:
    """The encoder's keys `[B, M, S, H or 2 H]` and values `[B, M, S, H]` of one layer, ready for a token."""

    def __init__(self, layer: EncoderCacheLayer, mask: torch.Tensor | None):
        # the mask is held, so that no other one can have its identity
        self.made_from, self.mask = (layer, layer.version, id(mask)), mask
        key, value = layer.whole, layer.values
        seen = None if mask is None or mask.all() else mask.bool()
        self.cross = key, value, seen
        wide = torch.promote_types(key.dtype, torch.float32)
        self.keys = key.flatten(0, 1).to(wide).mT.contiguous()
        self.values = value.flatten(0, 1).to(wide)
        self.bias = None
        if seen is not None:
            hidden = torch.zeros(seen.shape, dtype=wide, device=seen.device).masked_fill_(~seen, -math.inf)
            self.bias = hidden.repeat_interleave(key.shape[1], dim=0)[:, None]

    def logits(self, query: torch.Tensor) -> torch.Tensor:
        """`[B M, G, S]` of scaled queries `[B M, G, H or 2 H]`."""
        if self.bias is None:
            return torch.bmm(query, self.keys)
        return torch.baddbmm(self.bias, query, self.keys)


def _norm_of(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A norm as a function of `[B, D]`, faster than the operator for one token.

    `x w / sqrt(mean(x^2) + eps) = x (sqrt(D) w) / hypot(|x|, sqrt(D eps))`.
    """
    if type(norm) is nn.Identity:
        return norm.forward
    weight, floor = _norm_weight(norm)

    def normalize(states: torch.Tensor) -> torch.Tensor:
        # cast once: operators with two types make a copy each
        states, dtype = states.to(weight.dtype), states.dtype
        length = torch.linalg.vector_norm(states, 2, -1, True)
        return (states * weight).div_(torch.hypot(length, floor)).to(dtype)

    return normalize


def _norm_weight(norm: nn.RMSNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """`sqrt(D) w` and `sqrt(D eps)` of a norm, see [`_norm_of`]."""
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    size = norm.normalized_shape[0]
    eps = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
    weight = (norm.weight.detach().to(wide) + getattr(norm, "offset", 0.0)) * size**0.5
    return weight, norm.weight.new_tensor((size * eps) ** 0.5, dtype=wide)
