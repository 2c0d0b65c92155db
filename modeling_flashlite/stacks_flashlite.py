# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Encoder and decoder of Flash-Lite, and the base class of all its models.

Shapes: B batch, T target columns, S source columns, D hidden size, E embedding size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .base_flashlite import FlashLitePreTrainedModel, check_inputs
from .cache_flashlite import (
    FlashLiteCache,
    axis_spec,
    own_cache,
    prepare_cache,
)
from .compat_flashlite import CACHE, CacheNames, takes_cache
from .configuration_flashlite import FlashLiteDecoderConfig, FlashLiteEncoderConfig
from .layers_flashlite import (
    DecoderContext,
    FlashLiteDecoderAttention,
    FlashLiteDecoderLayer,
    FlashLiteEncoderAttention,
    FlashLiteEncoderLayer,
    equal_sources,
    product_dtype,
    state_norm,
)
from .linear_flashlite import Linear
from .positions_flashlite import first_block_shift, layer_angles, shift_angles
from .rows_flashlite import Rows, packed_rows, padded_rows


@dataclass
class FlashLiteDecoderOutput(CacheNames, BaseModelOutputWithPastAndCrossAttentions):
    """The decoder's output; `memory` is the segment memory after this segment, if one was given."""

    memory: FlashLiteCache | None = None


class FlashLiteStack(FlashLitePreTrainedModel):
    """Embeddings, layers and final norm, common to both stacks."""

    def __init__(self, config, layer_class):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        multiplier = config.embedding_multiplier
        self.embedding_multiplier = config.embedding_size**0.5 if multiplier is None else multiplier
        self.embed_proj = None
        if config.embedding_size != config.hidden_size:
            self.embed_proj = Linear(config.embedding_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = state_norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False

    def embed(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Table rows `[B, T, E]` -> first hidden states `[B, T, D]`."""
        hidden_states = inputs_embeds * self.embedding_multiplier
        if self.embed_proj is not None:
            hidden_states = self.embed_proj(hidden_states)
        return self.dropout(hidden_states)


class FlashLiteEncoder(FlashLiteStack):
    """The dense bidirectional encoder."""

    config: FlashLiteEncoderConfig
    config_class = FlashLiteEncoderConfig
    _can_record_outputs = {"hidden_states": FlashLiteEncoderLayer, "attentions": FlashLiteEncoderAttention}

    def __init__(self, config: FlashLiteEncoderConfig):
        super().__init__(config, FlashLiteEncoderLayer)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple | BaseModelOutput:
        r"""Run the encoder over `[B, S]` tokens.

        Args:
            input_ids, inputs_embeds: tokens `[B, S]` or table rows `[B, S, E]`; exactly one of them.
            attention_mask: real tokens `[B, S]`; padding may be on any side.
            position_ids: `[B, S]`. Positions are derived from the mask; position ids that restart within a row are
                refused.
            output_attentions, output_hidden_states: what to record; `capture_outputs` reads them.

        Raises:
            ValueError: for inputs that cannot be meant; see `check_inputs`.
        """
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if packed_rows(inputs_embeds, attention_mask, position_ids) is not None:
            raise ValueError(
                "The encoder's position ids restart within a row, which means packed documents, but the encoder "
                "reads whole rows; give each document its own row."
            )
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        hidden_states = self.embed(inputs_embeds)
        positions = source_positions(hidden_states, attention_mask)
        all_angles = layer_angles(self.config, positions, product_dtype(hidden_states))
        for layer, angles in zip(self.layers, all_angles):
            hidden_states = layer(hidden_states, angles, attention_mask=mask)
        return BaseModelOutput(last_hidden_state=self.dropout(self.norm(hidden_states)))


def source_positions(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions `[B or 1, S]` that count real tokens only, so that padding on any side changes nothing."""
    if attention_mask is None:
        return torch.arange(states.shape[1], device=states.device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


class FlashLiteDecoder(FlashLiteStack):
    """The sparse causal decoder, alone or over the states of an encoder."""

    config: FlashLiteDecoderConfig
    config_class = FlashLiteDecoderConfig
    _can_record_outputs = {
        "hidden_states": FlashLiteDecoderLayer,
        "attentions": OutputRecorder(FlashLiteDecoderAttention, index=1),
        "cross_attentions": OutputRecorder(FlashLiteDecoderAttention, index=2),
    }

    def __init__(self, config: FlashLiteDecoderConfig):
        super().__init__(config, FlashLiteDecoderLayer)
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: EncoderDecoderCache | FlashLiteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        memory: FlashLiteCache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple | FlashLiteDecoderOutput:
        r"""Run the decoder over `[B, T]` tokens.

        Args:
            input_ids, inputs_embeds: tokens `[B, T]` or table rows `[B, T, E]`; exactly one of them.
            attention_mask: real tokens `[B, T]`, or `[B, past + T]` with the cached columns; padding may be on any
                side.
            position_ids: `[B, T]`. Positions are counted from the mask; given ones tell, by restarting, where the
                documents of a packed batch begin.
            past_key_values: cache of the tokens before; it grows in place. It may be called `cache` too.
            use_cache: whether to return (and make) a cache.
            encoder_hidden_states, encoder_attention_mask: `[B, S, D]` states of the encoder and their mask `[B, S]`.
            memory: segment memory before this segment, from `new_memory()` or the previous output. The output's
                `memory` holds the one after it. It works in training too, where nothing flows back into it.
            output_attentions, output_hidden_states: what to record; `capture_outputs` reads them.

        Raises:
            ValueError: for inputs that cannot be meant; see `check_inputs`.
        """
        check_past(self, past_key_values, memory)
        past_columns = 0 if past_key_values is None else past_key_values.get_seq_length()
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, past_columns)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        rows = packed_rows(inputs_embeds, attention_mask, position_ids)
        check_packed(rows, encoder_hidden_states, past_key_values, memory)
        # a packed batch has no single end to continue from, and the cache's content depends on the values of the mask
        use_cache = use_cache and rows is None and not torch.compiler.is_exporting()
        if use_cache and memory is None or past_key_values is not None:
            past_key_values = prepare_cache(past_key_values, self.config, encoder_hidden_states is not None)
        context = DecoderContext(padded_rows(inputs_embeds, attention_mask) if rows is None else rows)
        context.past_key_values, context.memory = past_key_values, memory
        context.next_memory = None if memory is None else FlashLiteCache(self.config)
        if encoder_hidden_states is not None:
            encoder_hidden_states = self.read_encoder(encoder_hidden_states, encoder_attention_mask, context)
        hidden_states = self.embed(inputs_embeds)
        positions, dtype = target_positions(hidden_states, context), product_dtype(hidden_states)
        angles, context.shift_angles = (
            layer_angles(self.config, positions, dtype),
            self._shift_angles(positions, context, dtype),
        )
        return FlashLiteDecoderOutput(
            last_hidden_state=self.run_layers(hidden_states, encoder_hidden_states, angles, context),
            memory=context.next_memory,
            **{CACHE: past_key_values if use_cache else None},
        )

    def run_layers(self, hidden_states, encoder_hidden_states, angles, context: DecoderContext) -> torch.Tensor:
        """Embedded tokens `[B, T, D]` and the angles of each layer -> states after the final norm."""
        # fewer layers run in early-exit drafts
        for layer, angle in zip(self.layers[: self.config.num_hidden_layers], angles):
            hidden_states = layer(hidden_states, encoder_hidden_states, angle, context)
        return self.dropout(self.norm(hidden_states))

    def _shift_angles(self, positions: torch.Tensor, context: DecoderContext, dtype: torch.dtype):
        """Angles of how much nearer the first block seems to the columns `[B or 1, T]`; `None` where it does not."""
        spec, past = axis_spec(self.config), context.past
        first = 0 if past is None else past.layers[0].base + past.layers[0].fill
        last = int(first.max() if isinstance(first, torch.Tensor) else first) + positions.shape[1] - 1
        return shift_angles(self.config, positions, spec, dtype) if first_block_shift(last, spec) else None

    def read_encoder(self, states: torch.Tensor, mask: torch.Tensor | None, context: DecoderContext) -> torch.Tensor:
        """Put into `context` what belongs to the encoder's states `[B, S, D]`; returns those that layers have to read.

        Rows that repeat the previous row, as beams do, are read once if a cache keeps the keys of all rows.
        """
        if mask is not None and tuple(mask.shape) != tuple(states.shape[:2]):
            raise ValueError(
                f"The encoder's attention mask has shape {tuple(mask.shape)}, but its states "
                f"{tuple(states.shape[:2])}; give one entry per source token."
            )
        context.encoder_mask, past = None if mask is None else mask.bool(), context.past_key_values
        if past is not None and all(map(past.is_updated.get, range(len(self.layers)))):
            return states
        if past is not None and not self.training and (sources := equal_sources(states, mask)) is not None:
            first, context.sources = sources
            states, mask = states[first], None if mask is None else mask[first]
        context.encoder_angles = layer_angles(self.config, source_positions(states, mask), product_dtype(states))
        return states


def check_past(decoder: FlashLiteDecoder, past_key_values, memory) -> None:
    """Check that the decoder can continue from the given past.

    Raises:
        ValueError: for both a cache and a memory, something else than them, a memory of another model, or a cache in
            training with gradient checkpointing.
    """
    if past_key_values is not None and memory is not None:
        raise ValueError("Got both `past_key_values` and `memory`; a cache is a memory already, so give one of them.")
    if past_key_values is not None and not isinstance(own_cache(past_key_values), DynamicCache):
        raise ValueError(
            f"`past_key_values` is a {type(own_cache(past_key_values)).__name__}, but the cache must grow; pass a "
            "`FlashLiteCache`, an empty `DynamicCache`, or none, and leave `cache_implementation` out."
        )
    if memory is not None and not isinstance(memory, FlashLiteCache):
        raise ValueError(
            f"`memory` is a {type(memory).__name__}, but must be a `FlashLiteCache`; start from this model's "
            "`new_memory()`."
        )
    if memory is not None and len(memory.layers) != len(decoder.layers):
        raise ValueError(
            f"The memory has {len(memory.layers)} layers, but the decoder has {len(decoder.layers)}; start from this "
            "model's `new_memory()`."
        )
    checkpoints = decoder.gradient_checkpointing and decoder.training and torch.is_grad_enabled()
    if past_key_values is not None and checkpoints:
        raise ValueError(
            "`past_key_values` is given in training with gradient checkpointing, which would write every token into "
            "it twice; pass the past as `memory`, or disable one of them."
        )


def check_packed(rows: Rows | None, encoder_hidden_states, past_key_values, memory) -> None:
    """Refuse packed documents together with inputs that belong to whole rows.

    Raises:
        ValueError: for packed documents with an encoder's states, a cache or a segment memory.
    """
    wholes = {
        "an encoder's states belong": encoder_hidden_states,
        "a cache belongs": past_key_values,
        "a segment memory belongs": memory,
    }
    for belong in (name for name, given in wholes.items() if rows is not None and given is not None):
        raise ValueError(
            f"The decoder's position ids restart within a row, which means packed documents, but {belong} to whole "
            f"rows; give each document its own row."
        )


def target_positions(hidden_states: torch.Tensor, context: DecoderContext) -> torch.Tensor:
    """Positions `[B or 1, T]` of the new columns: real tokens of the row that came before."""
    if context.rows is None:
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
    else:
        positions = context.rows.slot % context.rows.source.shape[1]
    if context.past is None:
        return positions
    layer = context.past.layers[0]
    first = layer.base + layer.fill
    return positions + (first[:, None] if isinstance(first, torch.Tensor) else first)
