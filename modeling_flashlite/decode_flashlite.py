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
from .int4_flashlite import is_few_rows
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


class DecodeSession:
    """Called like the decoder, and equal to it; see [`decode_session`].

    `step_class` runs a layer; faster ones take its place.
    """

    step_class: type[LayerStep] = LayerStep

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
        place, encoder = self._place(own.layers[0], states), None
        for index, step in enumerate(self._steps(past_key_values)):
            if own is not past_key_values:
                cross = past_key_values.cross_attention_cache.layers[index]
                encoder = step.encoder_keys(cross, kwargs.get("encoder_attention_mask"))
            states = step(states, own.layers[index], place, encoder)
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

    def _steps(self, past_key_values) -> "list[LayerStep]":
        """The steps of all layers, made when the first token comes; none where the decoder has to run."""
        weight = self.decoder.embed_tokens.weight
        # tensors made in inference mode cannot be written to outside of it
        made_for = weight.dtype, weight.device, product_dtype(weight), torch.is_inference_mode_enabled()
        if self.layers is None or self._made_for != made_for or self._cache is not past_key_values:
            self.forget()
            plain = is_plain(self.decoder) and product_dtype(weight) == weight.dtype
            layers = zip(self.decoder.layers, itertools.count(), self.kinds)
            self.layers = [self.step_class(*layer, weight.dtype) for layer in layers] if plain else []
            self._made_for, self._cache = made_for, past_key_values
        return self.layers

    def _place(self, cache: FlashLiteCacheLayer, like: torch.Tensor) -> Place:
        """Positions of the next tokens after the contents of a cache layer."""
        if not is_ragged(cache):
            position = cache.base + cache.fill
            return Place(is_few_rows(like), self._angles(position, like), self._shift_angles(position, like))
        start = torch.as_tensor(cache.fill, device=like.device).expand(len(like))
        positions, wide = start + cache.base, torch.promote_types(like.dtype, torch.float32)
        spec, heads = axis_spec(self.decoder.config), self.decoder.config.num_key_value_heads
        shift = None
        if first_block_shift(int(positions.max()), spec):
            angles = shift_angles(self.decoder.config, positions[:, None], spec, wide)
            shift = [tuple(part[:, 0].repeat_interleave(heads, dim=0)[None] for part in pair) for pair in angles]
        unseen = torch.arange(int(start.max()) + 1, device=like.device) > start[:, None]
        bias = torch.zeros(unseen.shape, dtype=wide, device=like.device).masked_fill_(unseen, -math.inf)
        bias = bias.repeat_interleave(heads, dim=0)[:, None]
        return Place(is_few_rows(like), self._tables_of(positions[None], wide), shift, bias)

    def _tables_of(self, positions: torch.Tensor, dtype: torch.dtype) -> dict[str | None, Angles]:
        """Angles of `positions` `[1, P]` for each kind of layer."""
        attention, kinds = self.decoder.layers[0].self_attn, set(self.kinds)
        return {
            kind: _table_of(attention, *position_angles(self.decoder.config, positions, dtype, kind)) for kind in kinds
        }

    def _angles(self, position: int, like: torch.Tensor) -> dict[str | None, Angles]:
        """The angles of one position for each kind of layer, from tables of some positions."""
        first, index = position - position % self.positions, position % self.positions
        if self._tables is None or self._tables[0] != first:
            positions = torch.arange(first, first + self.positions, device=like.device)[None]
            self._tables = first, self._tables_of(positions, torch.promote_types(like.dtype, torch.float32))
        return {kind: Angles(*(table[index] for table in tables)) for kind, tables in self._tables[1].items()}

    def _shift_angles(self, position: int, like: torch.Tensor):
        """Angles, for each layer, of how much nearer the first block seems to this position, made once a block.

        `None` without a shift.
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
