# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Decoding: everything that generation derives from weights and cache, and the token step that uses it.

A [`DecodeSession`] takes the place of the decoder while a model generates. For a token of a small model per-operator
overhead (about 1 us) dominates, and most operations of the layers only shape states or recompute what the weights
alone determine. The session computes that once per generation and runs a token in few operations. The decoder itself
is the reference, and runs everything that a session does not support: prompts, training, recorded states, hooks.

`generate` opens a session through `_optimize_model_for_decode`; [`decode_session`] opens one for a custom loop. A
session owns all derived state and releases it when it closes. State derived from a cache is keyed by the `version` of
the cache's layers, which increases with every change other than appending. Only the joint products of coded layers
outlive a session (see [`join`]): rebuilding them would take a third of the time of a short generation.

Shapes: B batch, N query heads, M key-value heads, G = N / M, H head size, D hidden size, S key slots.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.cache_utils import Cache

from .base_flashlite import check_inputs
from .cache_flashlite import FlashLiteCacheLayer, axis_spec, own_cache
from .compat_flashlite import CACHE
from .int4_flashlite import are_few_rows
from .layer_step_flashlite import Angles, LayerStep, Place, norms_of
from .layers_flashlite import (
    FlashLiteDecoderAttention,
    FlashLiteDecoderLayer,
    FlashLiteMLP,
    FlashLiteRMSNorm,
    product_dtype,
)
from .linear_flashlite import is_hooked
from .positions_flashlite import LENGTH_ROPES, first_block_shift, position_angles, shift_angles
from .stacks_flashlite import FlashLiteDecoder, FlashLiteDecoderOutput

# positions whose angles are computed together, if they depend on nothing else
_ANGLES = 64

# the open sessions of this thread (or task), by decoder; a draft model decodes within the generation of its target
_SESSIONS: ContextVar[dict[FlashLiteDecoder, "DecodeSession"] | None] = ContextVar("sessions", default=None)


@contextlib.contextmanager
def decode_session(model) -> Iterator["DecodeSession"]:
    """Decode with a session inside this context; its derived state is released at the end.

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
    """The open session of `decoder`, or `decoder` itself."""
    if torch.compiler.is_compiling() or (sessions := _SESSIONS.get()) is None:
        return decoder
    return sessions.get(decoder, decoder)


class TokenStep:
    """One token of each row through a decoder: the steps of its layers, between its table and its last norm."""

    layer_class: type[LayerStep] = LayerStep

    def __init__(self, decoder: FlashLiteDecoder, dtype: torch.dtype):
        self.decoder = decoder
        layers = zip(decoder.layers, itertools.count(), decoder.config.rope_kinds)
        self.layers = [self.layer_class(*layer, dtype) for layer in layers]

    def __call__(self, input_ids: torch.Tensor, past_key_values, place: Place, encoder_mask) -> torch.Tensor:
        """Ids `[B, 1]` to the last hidden states `[B, 1, D]`; the cache grows in place."""
        decoder, own = self.decoder, own_cache(past_key_values)
        states, encoder = decoder.embed(decoder.embed_tokens(input_ids))[:, 0], None
        for index, step in enumerate(self.layers):
            if own is not past_key_values:
                encoder = step.encoder_keys(past_key_values.cross_attention_cache.layers[index], encoder_mask)
            states = step(states, own.layers[index], place, encoder)
        return decoder.norm(states[:, None])


class DecodeSession:
    """Called like the decoder, and equal to it; see [`decode_session`].

    `step_class` runs a token; faster ones take its place.
    """

    step_class: type[TokenStep] = TokenStep

    def __init__(self, decoder: FlashLiteDecoder):
        self.decoder, config = decoder, decoder.config
        # for batches of more than 4 rows, codes are unpacked once instead of for every token, see `int8_codes`
        self.int8_codes = WeakIdKeyDictionary()
        self.kinds = config.rope_kinds
        # positions whose angles are computed together; some angles depend on the length at hand
        self.positions = 1 if (config.rope_parameters or {}).get("rope_type") in LENGTH_ROPES else _ANGLES
        self.forget()

    def forget(self) -> None:
        """Release everything derived from weights and cache."""
        # `None` before the first token, and where the decoder has to run
        self.step: TokenStep | None = None
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
        assert self.step is not None  # made by `_takes`
        place = self._place(own.layers[0], len(input_ids))
        states = self.step(input_ids, past_key_values, place, kwargs.get("encoder_attention_mask"))
        return FlashLiteDecoderOutput(last_hidden_state=states, **{CACHE: past_key_values})

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
        return self._holds(past_key_values, has_encoder) and self._is_ready(past_key_values)

    def _holds(self, past_key_values, has_encoder: bool) -> bool:
        """Whether the cache is a grown one of this decoder, and has the encoder's keys, if any."""
        own, layers = own_cache(past_key_values), len(self.decoder.layers)
        # fewer layers run while a draft exits early
        if not layers == len(own.layers) == self.decoder.config.num_hidden_layers or own.offloading:
            return False
        if has_encoder == (own is past_key_values):
            return False
        if has_encoder and not all(map(past_key_values.is_updated.get, range(layers))):
            return False
        first = own.layers[0]
        return isinstance(first, FlashLiteCacheLayer) and not (has_encoder and is_ragged(first))

    def _is_ready(self, past_key_values) -> bool:
        """Whether there is a step for this cache, made when the first token comes; else the decoder has to run."""
        weight = self.decoder.embed_tokens.weight
        # tensors made in inference mode cannot be written to outside of it
        made_for = weight.dtype, weight.device, product_dtype(weight), torch.is_inference_mode_enabled()
        if self._made_for != made_for or self._cache is not past_key_values:
            self.forget()
            if is_plain(self.decoder) and product_dtype(weight) == weight.dtype:
                self.step = self.step_class(self.decoder, weight.dtype)
            self._made_for, self._cache = made_for, past_key_values
        return self.step is not None

    def _place(self, cache: FlashLiteCacheLayer, batch: int) -> Place:
        """Positions of the next tokens, one for each of so many rows, after the contents of a cache layer."""
        weight, few = self.decoder.embed_tokens.weight, are_few_rows(batch)
        device, wide = weight.device, torch.promote_types(weight.dtype, torch.float32)
        if not is_ragged(cache):
            position = cache.base + cache.fill
            return Place(few, self._angles(position, device, wide), self._shift_angles(position, device, wide))
        start = torch.as_tensor(cache.fill, device=device).expand(batch)
        positions = start + cache.base
        spec, heads = axis_spec(self.decoder.config), self.decoder.config.num_key_value_heads
        shift = None
        if first_block_shift(int(positions.max()), spec):
            angles = shift_angles(self.decoder.config, positions[:, None], spec, wide)
            shift = [tuple(part[:, 0].repeat_interleave(heads, dim=0)[None] for part in pair) for pair in angles]
        unseen = torch.arange(int(start.max()) + 1, device=device) > start[:, None]
        bias = torch.zeros(unseen.shape, dtype=wide, device=device).masked_fill_(unseen, -math.inf)
        bias = bias.repeat_interleave(heads, dim=0)[:, None]
        return Place(few, self._tables_of(positions[None], wide), shift, bias)

    def _tables_of(self, positions: torch.Tensor, dtype: torch.dtype) -> dict[str | None, Angles]:
        """Angles of `positions` `[1, P]` for each kind of layer."""
        attention, kinds = self.decoder.layers[0].self_attn, set(self.kinds)
        return {
            kind: _table_of(attention, *position_angles(self.decoder.config, positions, dtype, kind)) for kind in kinds
        }

    def _angles(self, position: int, device: torch.device, dtype: torch.dtype) -> dict[str | None, Angles]:
        """The angles of one position for each kind of layer, from tables of some positions."""
        first, index = position - position % self.positions, position % self.positions
        if self._tables is None or self._tables[0] != first:
            positions = torch.arange(first, first + self.positions, device=device)[None]
            self._tables = first, self._tables_of(positions, dtype)
        return {kind: Angles(*(table[index] for table in tables)) for kind, tables in self._tables[1].items()}

    def _shift_angles(self, position: int, device: torch.device, dtype: torch.dtype):
        """Angles, for each layer, of how much nearer the first block seems to this position, made once a block.

        `None` without a shift.
        """
        spec = axis_spec(self.decoder.config)
        shift = first_block_shift(position, spec)
        if shift and (self._shift is None or self._shift[0] != shift):
            positions = torch.tensor([[position]], device=device)
            self._shift = shift, shift_angles(self.decoder.config, positions, spec, dtype)
        return self._shift[1] if shift else None


def is_ragged(cache: FlashLiteCacheLayer) -> bool:
    """Whether the rows of a layer of the cache differ in length."""
    return isinstance(cache.fill, torch.Tensor) or isinstance(cache.base, torch.Tensor)


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
        norms = norms_of(layer)
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
