# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Decoding: everything that generation derives from weights and cache, and the token step that uses it.

A [`DecodeSession`] takes the place of the decoder while a model generates. For a token of a small model per-operator
overhead (about 1 us) dominates, and most operations of the layers only shape states or recompute what the weights
alone determine. The session computes that once per generation and runs a token in few operations. The decoder itself
is the slow truth; it runs whatever a session does not take: prompts, padded rows, training, recorded states, hooks.

`generate` opens a session through `_optimize_model_for_decode`; [`decode_session`] opens one for a loop of one's own.
A session owns what it derives, and releases it when it closes. What it derives from a cache is keyed by the `version`
of the cache's layers, which rises with every change other than appending. Only the joint products of coded layers stay
with these (see [`join`]): making them for every generation would cost a third of the time of a short one.

Shapes: B batch, N query heads, M key-value heads, G = N / M, H head size, D hidden size, S key slots.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.cache_utils import Cache

from .attention_flashlite import WorkingSet, fits_working_set, joint_weights, multi_axis_attention
from .cache_flashlite import EncoderCacheLayer, FlashLiteCacheLayer, axis_spec, own_cache
from .compat_flashlite import CACHE
from .ecq_modules_flashlite import EcqLinear, join
from .int4_flashlite import int4_few_rows, is_few_rows
from .layers_flashlite import (
    LENGTH_ROPES,
    FlashLiteDecoderAttention,
    FlashLiteDecoderLayer,
    FlashLiteMLP,
    FlashLiteRMSNorm,
    first_block_shift,
    nearer,
    position_angles,
    product_dtype,
    shift_angles,
)
from .linear_flashlite import Linear, is_hooked, linear
from .stacks_flashlite import FlashLiteDecoder, FlashLiteDecoderOutput, check_inputs
from .tiles_flashlite import TILE_ROWS

# positions whose angles are computed together, if they depend on nothing else
_ANGLES = 64

# the open sessions of this thread (or task), by decoder; a draft model decodes within the generation of its target
_SESSIONS: ContextVar[dict[FlashLiteDecoder, "DecodeSession"] | None] = ContextVar("sessions", default=None)


@contextlib.contextmanager
def decode_session(model) -> Iterator["DecodeSession"]:
    """Decode by a session within this context; all that it derived is released at the end.

    Contexts nest: the outermost one owns the sessions of all models that decode within it. Weights must not change
    while a session is open, except before a new prompt.

    Args:
        model ([`FlashLiteHeadModel`]): whose decoder is replaced by the session.

    Yields:
        [`DecodeSession`].
    """
    outer, decoder = _SESSIONS.get(), model.get_decoder()
    sessions = {} if outer is None else outer
    session = sessions.setdefault(decoder, DecodeSession(decoder))
    with contextlib.ExitStack() as stack:
        if outer is None:
            stack.callback(_SESSIONS.reset, _SESSIONS.set(sessions))
            stack.callback(_forget_all, sessions)
        yield session


def _forget_all(sessions: "dict[FlashLiteDecoder, DecodeSession]") -> None:
    for session in sessions.values():
        session.forget()


def decoding(decoder: FlashLiteDecoder) -> "FlashLiteDecoder | DecodeSession":
    """What decodes in the place of `decoder`: its open session, or itself."""
    if torch.compiler.is_compiling() or (sessions := _SESSIONS.get()) is None:
        return decoder
    return sessions.get(decoder, decoder)


class Angles(NamedTuple):
    """Cosines and sines of one position as a token needs them; or tables of them.

    For rotary positions `cos` and `sin` are `[N + M, H]`, for queries and keys together: sines have the sign of their
    half, and the rows of queries are scaled. Else they are `[H]`, each twice, and `both` `[H]` has them in a row.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    both: torch.Tensor


class DecodeSession:
    """Called like the decoder, and equal to it; see [`decode_session`]."""

    def __init__(self, decoder: FlashLiteDecoder):
        self.decoder, config = decoder, decoder.config
        # codes that batches of more than 16 rows unpack once instead of for every token, see `int8_codes`
        self.int8_codes = WeakIdKeyDictionary()
        self.kinds = config.rope_kinds
        # positions whose angles are computed together; some angles depend on the length at hand
        self.positions = 1 if (config.rope_parameters or {}).get("rope_type") in LENGTH_ROPES else _ANGLES
        self.forget()

    def forget(self) -> None:
        """Release everything that was derived from weights and cache."""
        # the layers' steps: `None` before the first token, empty where the decoder has to run
        self.layers: list[LayerStep] | None = None
        self._made_for: Any = None
        self._cache: Any = None
        self._tables: Any = None
        self._shift: Any = None

    def __call__(self, input_ids=None, attention_mask=None, **kwargs) -> FlashLiteDecoderOutput:
        """The decoder's output for its arguments; see [`FlashLiteDecoder.forward`]."""
        past_key_values = kwargs.pop(CACHE, None)
        if not self._takes(input_ids, attention_mask, past_key_values, kwargs):
            is_new = past_key_values is None or not past_key_values.get_seq_length()
            if is_new and kwargs.get("use_cache") is not False:
                self.forget()  # weights may have changed before a new text
            arguments = {"attention_mask": attention_mask, CACHE: past_key_values, **kwargs}
            return self.decoder(input_ids=input_ids, **arguments)
        decoder, own = self.decoder, own_cache(past_key_values)
        check_inputs(decoder.config, input_ids, None, attention_mask, own.layers[0].columns)
        states = decoder.embed(decoder.embed_tokens(input_ids))[:, 0]
        position = own.layers[0].base + own.layers[0].fill
        angles, shift = self._angles(position, states), self._shift_angles(position, states)
        for index, step in enumerate(self._steps(past_key_values)):
            encoder = None
            if own is not past_key_values:
                cross = past_key_values.cross_attention_cache.layers[index]
                encoder = step.encoder_keys(cross, kwargs.get("encoder_attention_mask"))
            states = step(states, own.layers[index], angles[self.kinds[index]], encoder, shift and shift[index])
        return FlashLiteDecoderOutput(last_hidden_state=decoder.norm(states[:, None]), **{CACHE: past_key_values})

    def _takes(self, input_ids, attention_mask, past_key_values, kwargs) -> bool:
        """Whether these arguments are one new token for each row of a cache, and nothing else is asked for."""
        use_cache = kwargs.get("use_cache")
        if (
            input_ids is None
            or input_ids.shape[1] != 1
            or kwargs.get("inputs_embeds") is not None
            or kwargs.get("memory") is not None
            or not (self.decoder.config.use_cache if use_cache is None else use_cache)
            or any(value for name, value in kwargs.items() if name.startswith("output_"))
            or not isinstance(past_key_values, Cache)
            or not past_key_values.get_seq_length()
            or self.decoder.training
            or torch.is_grad_enabled()
            or not (attention_mask is None or attention_mask[:, -1].all())
        ):
            return False
        has_encoder = kwargs.get("encoder_hidden_states") is not None
        return self._holds(past_key_values, has_encoder) and bool(self._steps(past_key_values))

    def _holds(self, past_key_values, has_encoder: bool) -> bool:
        """Whether all rows of the cache hold the same number of tokens, and it has the encoder's keys, if any."""
        own, layers = own_cache(past_key_values), len(self.decoder.layers)
        # fewer layers run while a draft exits early
        if not layers == len(own.layers) == self.decoder.config.num_hidden_layers or own.offloading:
            return False
        if has_encoder == (own is past_key_values):
            return False
        if has_encoder and not all(map(past_key_values.is_updated.get, range(layers))):
            return False
        first = own.layers[0]
        alike = isinstance(first, FlashLiteCacheLayer) and isinstance(first.fill, int) and isinstance(first.base, int)
        return alike and first.mask is None

    def _steps(self, past_key_values) -> "list[LayerStep]":
        """The steps of all layers, made when the first token comes; none where the decoder has to run."""
        weight = self.decoder.embed_tokens.weight
        # tensors made in inference mode cannot be written to outside of it
        made_for = weight.dtype, weight.device, product_dtype(weight), torch.is_inference_mode_enabled()
        if self.layers is None or self._made_for != made_for or self._cache is not past_key_values:
            self.forget()
            plain = is_plain(self.decoder) and product_dtype(weight) == weight.dtype
            self.layers = [LayerStep(layer) for layer in self.decoder.layers] if plain else []
            self._made_for, self._cache = made_for, past_key_values
        return self.layers

    def _angles(self, position: int, like: torch.Tensor) -> dict[str | None, Angles]:
        """The angles of one position for each kind of layer, from tables of some positions."""
        first, index = position - position % self.positions, position % self.positions
        if self._tables is None or self._tables[0] != first:
            positions = torch.arange(first, first + self.positions, device=like.device)[None]
            dtype = torch.promote_types(like.dtype, torch.float32)
            config, kinds = self.decoder.config, set(self.kinds)
            attention = self.decoder.layers[0].self_attn
            tables = {kind: _table_of(attention, *position_angles(config, positions, dtype, kind)) for kind in kinds}
            self._tables = first, tables
        return {kind: Angles(*(table[index] for table in tables)) for kind, tables in self._tables[1].items()}

    def _shift_angles(self, position: int, like: torch.Tensor):
        """Angles, for each layer, of how much nearer the first block seems to this position, made once a block.

        `None` where it stands where it is.
        """
        spec = axis_spec(self.decoder.config)
        shift = first_block_shift(position, spec)
        if shift and (self._shift is None or self._shift[0] != shift):
            positions, dtype = (
                torch.tensor([[position]], device=like.device),
                torch.promote_types(like.dtype, torch.float32),
            )
            self._shift = shift, shift_angles(self.decoder.config, positions, spec, dtype)
        return self._shift[1] if shift else None


def _table_of(attention: FlashLiteDecoderAttention, cos: torch.Tensor, sin: torch.Tensor) -> Angles:
    cos, sin = cos[0, 0], sin[0, 0]
    both, twice = torch.cat([cos, sin], dim=1), torch.cat([cos, cos], dim=1)
    if not attention.is_rotary:
        return Angles(twice, torch.cat([sin, sin], dim=1), both)
    config = attention.config
    scales = cos.new_ones(config.num_attention_heads + config.num_key_value_heads, 1)
    scales[: config.num_attention_heads] = attention.scaling
    return Angles(twice[:, None] * scales, torch.cat([-sin, sin], dim=1)[:, None] * scales, both)


def is_plain(decoder: FlashLiteDecoder) -> bool:
    """Whether nothing hangs on the modules that a session does not call: hooks, shards, recorders, other classes."""
    config = decoder.config
    if config._attn_implementation != "sdpa" or config.output_attentions or config.output_hidden_states:
        return False
    if type(decoder) is not FlashLiteDecoder or is_hooked(decoder):
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
    """What runs a module: its forward, without the machinery for hooks where there are none."""
    if is_hooked(module):
        return module
    if type(module) in (nn.Linear, Linear):
        return functools.partial(linear, weight=module.weight, bias=module.bias)
    if _is_coded(module):
        kernel, size = module.prepared(), module.out_features
        return lambda states: int4_few_rows(states, kernel, size) if is_few_rows(states) else module.forward(states)
    return module.forward


def _is_coded(module: nn.Module) -> bool:
    """Whether a layer is nothing but a product with codes on the CPU."""
    coded = type(module) is EcqLinear and module.tiles is not None and module.tiles.is_cpu
    return coded and module.bias is None and not module.step.requires_grad


def _together(norm: nn.Module, layers: list[nn.Module]) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """The outputs of several layers that read the same norm of `[B, D]`: by one product, where they are codes.

    The weight of the norm is folded into what coded layers multiply their inputs by.
    """
    normalize = _norm_of(norm)
    joint = None if any(map(is_hooked, layers)) else join(layers)
    if joint is None:
        calls = list(map(_call, layers))

        def apart(states: torch.Tensor) -> list[torch.Tensor]:
            states = normalize(states)
            return [call(states) for call in calls]

        return apart
    starts = itertools.accumulate((len(layer.tiles) * TILE_ROWS for layer in layers), initial=0)
    places = [(1, start, layer.out_features) for start, layer in zip(starts, layers)]
    few = _few_normed_rows(norm, joint) if _is_coded(joint) and isinstance(norm, nn.RMSNorm) else None

    def product(states: torch.Tensor) -> list[torch.Tensor]:
        if few is not None and is_few_rows(states):
            output = few(states)
        else:
            output = joint.forward(normalize(states))
        return [output.narrow(*place) for place in places]

    return product


def _few_normed_rows(norm: nn.RMSNorm, layer: EcqLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    """`layer(norm(x))` of few rows `[B, D]`, the norm's weight and the layer's factors being multiplied as one."""
    packed, group, scales, numbers, factors = layer.prepared()
    weight, floor = _norm_weight(norm)
    weight = weight if numbers is None else weight.index_select(0, numbers)
    weight = weight if factors is None else weight * factors
    spare = 2 * packed.shape[1] - len(weight)

    def product(states: torch.Tensor) -> torch.Tensor:
        rows, dtype = states.to(weight.dtype), states.dtype
        length = torch.hypot(torch.linalg.vector_norm(rows, 2, -1, True), floor)
        rows = (rows if numbers is None else rows.index_select(1, numbers)) * weight
        rows = rows.div_(length).to(torch.bfloat16)
        rows = nn.functional.pad(rows, (0, spare)) if spare else rows
        return torch.ops.aten._weight_int4pack_mm_for_cpu.default(rows, packed, group, scales).to(dtype)

    return product


class LayerStep:
    """One layer of a [`DecodeSession`]: constants of its weights, and what its cache holds in the form of a token."""

    def __init__(self, layer: FlashLiteDecoderLayer):
        attention = layer.self_attn
        self.attention, self.spec = attention, attention.spec
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        before, after, before_mlp, after_mlp = _norms(layer)
        self.query_key_value = _together(before, [attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up = _together(before_mlp, [layer.mlp.gate_proj, layer.mlp.up_proj])
        self.o, self.down = _call(attention.o_proj), _call(layer.mlp.down_proj)
        self.act = _call(layer.mlp.act_fn)
        self.after, self.after_mlp = _norm_of(after), _norm_of(after_mlp)
        self.head_norms = _call(attention.q_norm), _call(attention.k_norm)
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
        self,
        states: torch.Tensor,
        cache: FlashLiteCacheLayer,
        angles: Angles,
        encoder: "EncoderKeys | None",
        shift: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """States `[B, D]` of the newest tokens -> `[B, D]`; the cache grows in place.

        `shift` are the angles of how much nearer the first block seems, where it does.
        """
        query, key, value = self.query_key_value(states)
        batch = states.shape[0]
        query, key = self._place(self.head_norms[0](query), self.head_norms[1](key), angles)
        keys, values = cache.update(key, value.view(batch, -1, 1, self.head_dim))
        first = None if shift is None else nearer(query[None], *shift)[0]
        attended = self._attend(query, keys, values, cache, encoder, first).reshape(batch, -1)
        states = torch.add(states, self.after(self.o(attended.to(states.dtype))), alpha=self.multiplier)
        gate, up = self.gate_up(states)
        return torch.add(states, self.after_mlp(self.down(self.act(gate) * up)), alpha=self.multiplier)

    def _place(self, query: torch.Tensor, key: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled queries `[B M, G, H or 2 H]` and keys `[B, M, 1, H or 2 H]` with their positions.

        From queries `[B, N H]` and keys `[B, M H]`; queries are of the type of the computation.
        """
        size, batch = self.head_dim, query.shape[0]
        if self.query_map is None:
            # the pairs of queries and keys turn together: x [cos, cos] + [second, first] [-sin, sin]
            heads = torch.cat([query, key], dim=1).to(angles.cos.dtype).view(batch, -1, size)
            heads = torch.addcmul(heads * angles.cos, heads.roll(size // 2, 2), angles.sin)
            count = query.shape[1] // size
            query, key = heads.narrow(1, 0, count), heads.narrow(1, count, heads.shape[1] - count)
            return query.reshape(-1, self.groups, size), key.unsqueeze(2)
        key = key.view(batch, -1, 1, size)
        key = torch.cat([key, angles.both.to(key.dtype).expand(key.shape)], dim=-1)
        bias, matrix = self.query_map
        # the heads are the batch of the product
        rows = query.view(batch, -1, size).transpose(0, 1).to(matrix.dtype)
        query = torch.baddbmm(bias, rows, matrix)
        query.narrow(2, size, size).mul_(angles.cos).addcmul_(query.narrow(2, 2 * size, size), angles.sin)
        return query.narrow(2, 0, 2 * size).transpose(0, 1).reshape(-1, self.groups, 2 * size), key

    def _attend(self, query, keys, values, cache, encoder, first) -> torch.Tensor:
        """Scaled queries `[B M, G, H or 2 H]` over the slots of cache and encoder: `[B M, G, H]` or `[B, N, 1, H]`.

        `first` are the queries of the first block, where they are others.
        """
        spec, start = self.spec, cache.start
        if first is None and spec.is_dense(start // spec.block_size):
            return self._attend_densely(query, keys, values, encoder)
        cross = None if encoder is None else encoder.cross
        working = self._working_set(keys, values, cache, cross)
        if working is not None:
            return working.attend(query, keys, values, start, first)
        rows, first = (x if x is None else x.view(len(keys), -1, 1, query.shape[2]) for x in (query, first))
        settings = {"start": start, "scaling": 1.0, "first_query": first, "summaries": cache.summaries}
        return multi_axis_attention(rows, keys, values, spec, cross=cross, **settings)

    @staticmethod
    def _attend_densely(query, keys, values, encoder) -> torch.Tensor:
        keys, values = (states.flatten(0, 1).to(query.dtype) for states in (keys, values))
        logits = torch.bmm(query, keys.mT)
        if encoder is None:
            return torch.bmm(logits.softmax(2), values)
        own, other = joint_weights([logits, encoder.logits(query)])
        return torch.baddbmm(torch.bmm(own, values), other, encoder.values)

    def _working_set(self, keys, values, cache: FlashLiteCacheLayer, cross) -> WorkingSet | None:
        """The working set of the newest token's block; `None` where it would not pay, as while beams change places."""
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
