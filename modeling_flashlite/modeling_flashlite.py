# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Flash-Lite: a dense bidirectional encoder and a sparse decoder with multi-axis attention and segment memory.

Shapes: B batch, T target columns, S source columns or key slots, N query heads, M key-value heads, H head size,
D hidden size, E embedding size, V vocabulary.
"""

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_flashlite import FlashLiteCache, Rows, prepare_cache, rows_of_documents, rows_of_mask
from .configuration_flashlite import FlashLiteConfig, FlashLiteDecoderConfig, FlashLiteEncoderConfig
from .layers_flashlite import (
    DecoderContext,
    FlashLiteAttention,
    FlashLiteDecoderAttention,
    FlashLiteDecoderLayer,
    FlashLiteEncoderAttention,
    FlashLiteEncoderLayer,
    position_angles,
)
from .loss_flashlite import chunked_cross_entropy

# imported to be registered: with it, coded checkpoints load wherever this file does
from .quantization_flashlite import EcqConfig  # noqa: F401

# training logits of more elements than this are never built: the loss then runs chunk by chunk over the tokens
_MAX_TRAINING_LOGITS = 2**26


@dataclass
class FlashLiteDecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """What the decoder returns; `memory` is the segment memory after this segment, where one was given."""

    memory: FlashLiteCache | None = None


@dataclass
class FlashLiteModelOutput(Seq2SeqModelOutput):
    """What the encoder-decoder returns; `memory` is the decoder's segment memory, where one was given."""

    memory: FlashLiteCache | None = None


@dataclass
class FlashLiteCausalLMOutput(CausalLMOutputWithPast):
    """What the decoder-only language model returns; `memory` is its segment memory, where one was given."""

    memory: FlashLiteCache | None = None


@dataclass
class FlashLiteSeq2SeqLMOutput(Seq2SeqLMOutput):
    """What the sequence-to-sequence model returns; `memory` is the decoder's segment memory, where one was given."""

    memory: FlashLiteCache | None = None


class FlashLitePreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, common to all Flash-Lite models."""

    config: FlashLiteConfig
    config_class = FlashLiteConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlashLiteEncoderLayer", "FlashLiteDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "memory", "context"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_context_parallel = False

    def __setattr__(self, name, value):
        if name == "loss_function" and isinstance(value, nn.Module):
            raise TypeError(
                f"`loss_function` is a {type(value).__name__}, an nn.Module: its weights would enter the checkpoint "
                "and it would be ignored; assign a plain callable such as a function or a dataclass."
            )
        super().__setattr__(name, value)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, FlashLiteAttention):
            for name in ("position_bias", "content_bias"):
                if hasattr(module, name):
                    init.zeros_(getattr(module, name))

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        decoder = self.get_decoder()
        if not self.config.tie_word_embeddings and decoder.embed_tokens is not embeddings:
            size = embeddings.weight.shape[0]
            decoder.embed_tokens = self._get_resized_embeddings(decoder.embed_tokens, size, None, mean_resizing)
        return embeddings

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Resize the vocabulary of encoder, decoder and head; see [`PreTrainedModel.resize_token_embeddings`]."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if isinstance(self.config, FlashLiteConfig):
            self.config.vocab_size = embeddings.weight.shape[0]
        return embeddings


def check_inputs(config, input_ids, inputs_embeds, attention_mask, past_columns: int = 0) -> None:
    """Refuse inputs that cannot be meant.

    Raises:
        ValueError: for none or two inputs, an empty sequence, ids outside the vocabulary, or a mask of a wrong shape.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Got both or neither of `input_ids` and `inputs_embeds`; give exactly one of them.")
    batch, columns = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
    if columns == 0:
        raise ValueError("The sequence is empty (0 tokens); give at least one token, such as the start token.")
    # a look at the values would stall an accelerator, whose embedding kernel checks by itself, and break a graph
    look = input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and input_ids.numel():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"Token id {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}; use this "
                "model's tokenizer, or resize the embeddings."
            )
    if attention_mask is not None:
        allowed = (batch, columns), (batch, past_columns + columns)
        if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) not in allowed:
            shape = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask)
            raise ValueError(
                f"The attention mask has shape {shape}, but {' or '.join(map(str, sorted(set(allowed))))} is needed; give "
                "one entry per token, 1 for real tokens and 0 for padding."
            )


class FlashLiteStack(FlashLitePreTrainedModel):
    """Embeddings, layers and final norm, common to both stacks."""

    def __init__(self, config, layer_class):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.embed_proj = None
        if config.embedding_size != config.hidden_size:
            self.embed_proj = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False

    def embed(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Table rows `[B, T, E]` -> first hidden states `[B, T, D]`."""
        hidden_states = inputs_embeds * self.config.embedding_size**0.5
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

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutput:
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        hidden_states = self.embed(inputs_embeds)
        angles = position_angles(self.config, source_positions(hidden_states, attention_mask), hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, angles, attention_mask=mask, **kwargs)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlashLiteDecoderOutput:
        r"""Run the decoder over `[B, T]` tokens.

        Args:
            input_ids, inputs_embeds: tokens `[B, T]` or table rows `[B, T, E]`; exactly one of them.
            attention_mask: real tokens `[B, T]`, or `[B, past + T]` with the cached columns; padding may stand on any
                side.
            position_ids: `[B, T]`. Positions are counted from the mask; given ones tell, by restarting, where the
                documents of a packed batch begin.
            past_key_values: cache of the tokens before; it grows in place.
            use_cache: whether to return (and make) a cache.
            encoder_hidden_states, encoder_attention_mask: `[B, S, D]` states of the encoder and their mask `[B, S]`.
            memory: segment memory before this segment, from `new_memory()` or the previous output. The output's
                `memory` holds the one after it. It works in training too, where nothing flows back into it.

        Raises:
            ValueError: for inputs that cannot be meant; see `check_inputs`.
        """
        if past_key_values is not None and memory is not None:
            raise ValueError(
                "Got both `past_key_values` and `memory`; a cache is a memory already, so give one of them."
            )
        past_columns = 0 if past_key_values is None else past_key_values.get_seq_length()
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, past_columns)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        continues = past_key_values is not None or memory is not None
        rows = None if continues else packed_rows(inputs_embeds, attention_mask, position_ids)
        if rows is not None and encoder_hidden_states is not None:
            raise ValueError(
                "`decoder_position_ids` restart within a row, which means packed documents, but an encoder's states "
                "belong to whole rows; give each document a row of its own."
            )
        # a packed batch has no single end to continue from, and what a cache holds depends on the mask's values
        use_cache = use_cache and rows is None and not torch.compiler.is_exporting()
        if use_cache and memory is None or past_key_values is not None:
            past_key_values = prepare_cache(past_key_values, self.config, encoder_hidden_states is not None)
        if rows is None:
            rows = padded_rows(inputs_embeds, attention_mask)
        hidden_states = self.embed(inputs_embeds)
        past = memory if past_key_values is None else past_key_values
        if isinstance(past, EncoderDecoderCache):
            past = past.self_attention_cache
        angles = position_angles(self.config, target_positions(hidden_states, rows, past), hidden_states.dtype)
        context = self._context(rows, memory, encoder_hidden_states, encoder_attention_mask)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, encoder_hidden_states, angles, context, past_key_values=past_key_values
            )
        return FlashLiteDecoderOutput(
            last_hidden_state=self.dropout(self.norm(hidden_states)),
            past_key_values=past_key_values if use_cache else None,
            memory=context.next_memory,
        )

    def _context(self, rows, memory, encoder_hidden_states, encoder_attention_mask) -> DecoderContext:
        context = DecoderContext(rows=rows, memory=memory)
        if memory is not None:
            if len(memory.layers) != len(self.layers):
                raise ValueError(
                    f"The memory has {len(memory.layers)} layers, but the decoder has {len(self.layers)}; start from "
                    "this model's `new_memory()`."
                )
            context.next_memory = FlashLiteCache(self.config)
        if encoder_hidden_states is not None:
            mask = encoder_attention_mask
            if mask is not None and tuple(mask.shape) != tuple(encoder_hidden_states.shape[:2]):
                raise ValueError(
                    f"The encoder's attention mask has shape {tuple(mask.shape)}, but its states "
                    f"{tuple(encoder_hidden_states.shape[:2])}; give one entry per source token."
                )
            positions = source_positions(encoder_hidden_states, mask)
            context.encoder_angles = position_angles(self.config, positions, encoder_hidden_states.dtype)
            context.encoder_mask = None if mask is None else mask.bool()
        return context


def padded_rows(states: torch.Tensor, attention_mask: torch.Tensor | None) -> Rows | None:
    """How the new columns `[B, T]` map to rows of real tokens; `None` where all are real."""
    mask = None if attention_mask is None else attention_mask[:, -states.shape[1] :].bool()
    # an exported graph cannot look at the mask, and does without the shortcut
    return None if mask is None or not torch.compiler.is_exporting() and mask.all() else rows_of_mask(mask)


def packed_rows(states, attention_mask, position_ids) -> Rows | None:
    """How the columns of packed documents map to rows; `None` where no `position_ids` restart within a row.

    An exported graph cannot look at the positions, and takes each row for one document.
    """
    if position_ids is None or states.shape[1] < 2 or torch.compiler.is_exporting():
        return None
    if attention_mask is not None and not attention_mask.all():
        return None
    jumps = position_ids.diff(dim=-1) != 1
    if not jumps.any():
        return None
    return rows_of_documents(nn.functional.pad(jumps, (1, 0), value=True).expand(states.shape[0], -1))


def target_positions(hidden_states: torch.Tensor, rows: Rows | None, past: FlashLiteCache | None) -> torch.Tensor:
    """Positions `[B or 1, T]` of the new columns: real tokens of the row that came before."""
    columns = hidden_states.shape[1]
    if rows is None:
        positions = torch.arange(columns, device=hidden_states.device)[None]
    else:
        positions = rows.slot % rows.source.shape[1]
    if past is None:
        return positions
    first = past.layers[0].base + past.layers[0].fill
    return positions + (first[:, None] if isinstance(first, torch.Tensor) else first)


class FlashLiteModel(FlashLitePreTrainedModel):
    """Encoder and decoder, or the decoder alone where `config.is_encoder_decoder` is false."""

    def __init__(self, config: FlashLiteConfig):
        super().__init__(config)
        if config.is_encoder_decoder:
            self.encoder = FlashLiteEncoder(config.encoder)
            self._tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}
        self.decoder = FlashLiteDecoder(config.decoder)
        self.post_init()

    def get_input_embeddings(self):
        return (self.encoder if self.config.is_encoder_decoder else self.decoder).embed_tokens

    def set_input_embeddings(self, new_embeddings):
        if self.config.is_encoder_decoder:
            self.encoder.embed_tokens = new_embeddings
        if not self.config.is_encoder_decoder or self.config.tie_word_embeddings:
            self.decoder.embed_tokens = new_embeddings

    def new_memory(self) -> FlashLiteCache:
        """An empty segment memory, to be passed as `memory` with the first segment."""
        return FlashLiteCache(self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | FlashLiteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        memory: FlashLiteCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlashLiteModelOutput | FlashLiteDecoderOutput:
        r"""Run encoder and decoder, or the decoder alone on `input_ids` where the config has no encoder.

        Args:
            input_ids, inputs_embeds: source tokens `[B, S]` or table rows `[B, S, E]`.
            attention_mask: real source tokens `[B, S]`; padding may stand on any side.
            position_ids, decoder_position_ids: positions are counted from the masks; in a decoder-only model, given
                ones tell, by restarting, where packed documents begin.
            decoder_input_ids, decoder_inputs_embeds: target tokens `[B, T]` or table rows `[B, T, E]`; by default
                `input_ids` shifted to the right.
            decoder_attention_mask: real target tokens `[B, T]` or `[B, past + T]`.
            encoder_outputs: what the encoder returned before, instead of running it.
            past_key_values: cache of the target tokens before; it grows in place.
            use_cache: whether to return (and make) a cache.
            memory: the decoder's segment memory before this segment; the output's `memory` holds the one after it.
        """
        own = {"past_key_values": past_key_values, "use_cache": use_cache, "memory": memory, **kwargs}
        if not self.config.is_encoder_decoder:
            outputs = self.decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **own,
            )
            # what was recorded under this name is empty: there is no encoder to attend to
            return type(outputs)(**{name: value for name, value in outputs.items() if name != "cross_attentions"})
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError(
                    "Neither `decoder_input_ids` nor `decoder_inputs_embeds` is given; give one, or `input_ids` to "
                    "take them from."
                )
            decoder_input_ids = shift_tokens_right(input_ids, self.config)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            **own,
        )
        return FlashLiteModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            memory=outputs.memory,
        )


def shift_tokens_right(labels: torch.Tensor, config: FlashLiteConfig) -> torch.Tensor:
    """Decoder inputs of `labels` `[B, T]`: the start token, then the labels but the last; -100 becomes padding."""
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise ValueError(
            f"`decoder_start_token_id` is {start} and `pad_token_id` {pad}, but decoder inputs are made from both; "
            "set them in the config."
        )
    shifted = labels.roll(1, dims=-1)
    shifted[..., 0] = start
    return shifted.masked_fill(shifted == -100, pad)


class FlashLiteHeadModel(FlashLitePreTrainedModel):
    """A model with a language-model head."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: FlashLiteConfig):
        super().__init__(config)
        self.model = FlashLiteModel(config)
        stack = config.decoder
        self.head_proj = None
        if stack.embedding_size != stack.hidden_size:
            self.head_proj = nn.Linear(stack.hidden_size, stack.embedding_size, bias=False)
        self.lm_head = nn.Linear(stack.embedding_size, stack.vocab_size, bias=False)
        self.loss_function = chunked_cross_entropy
        self.post_init()

    def new_memory(self) -> FlashLiteCache:
        """An empty segment memory, to be passed as `memory` with the first segment."""
        return self.model.new_memory()

    def _head(self, hidden_states, labels, logits_to_keep, **kwargs):
        """Loss and logits of the decoder's states `[B, T, D]`; `labels` `[B, T]` are aligned with them.

        Training batches with many logits get none: the loss then runs over chunks of tokens.
        """
        if self.head_proj is not None:
            hidden_states = self.head_proj(hidden_states)
        vocab_size = self.config.decoder.vocab_size
        chunked = "lm_head" in inspect.signature(self.loss_function).parameters
        large = hidden_states.shape[:-1].numel() * vocab_size > _MAX_TRAINING_LOGITS
        logits = None
        if labels is None or not (self.training and chunked and large):
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        if labels is None:
            return None, logits
        whole = logits is not None and logits.shape[:2] == hidden_states.shape[:2]
        if chunked:
            kwargs.update(hidden_states=hidden_states, lm_head=self.lm_head)
        else:
            kwargs.update(shift_labels=labels)
        loss = self.loss_function(
            logits=logits if whole or not chunked else None, labels=labels, vocab_size=vocab_size, **kwargs
        )
        return loss, logits


class FlashLiteForConditionalGeneration(FlashLiteHeadModel, GenerationMixin):
    """Encoder and decoder with a language-model head, for sequence-to-sequence tasks."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: FlashLiteConfig):
        if not config.is_encoder_decoder:
            raise ValueError(
                "`is_encoder_decoder` is False, but sequence-to-sequence generation needs an encoder; use "
                "`FlashLiteForCausalLM` or a config with an encoder."
            )
        super().__init__(config)
        self.loss_type = "ForMaskedLM"

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Decoder inputs of `labels` `[B, T]`; the collators of the library call this."""
        return shift_tokens_right(labels, self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        memory: FlashLiteCache | None = None,
        teacher_ids: torch.LongTensor | None = None,
        teacher_weights: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlashLiteSeq2SeqLMOutput:
        r"""Run the model over source `[B, S]` and target `[B, T]`; arguments as in [`FlashLiteModel`], and:

        Args:
            labels: targets `[B, T]`; -100 is ignored.
            memory: segment memory before this segment; the output's `memory` holds the one after it.
            teacher_ids, teacher_weights: tokens and probabilities `[B, T, k]` of a teacher's cached distributions,
                for a `loss_function` that distils.
            logits_to_keep: compute the logits of so many last positions, or of these positions; 0 means all.

        Returns:
            Loss and logits `[B, T, V]`. A training batch with labels and more than 2^26 logits gets none of them: its
            loss runs over chunks of tokens.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = shift_tokens_right(labels, self.config)
        if input_ids is None and inputs_embeds is None and encoder_outputs is None:
            raise ValueError("No encoder input is given; give `input_ids`, `inputs_embeds` or `encoder_outputs`.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            memory=memory,
            **kwargs,
        )
        loss, logits = self._head(
            outputs.last_hidden_state,
            labels,
            logits_to_keep,
            teacher_ids=teacher_ids,
            teacher_weights=teacher_weights,
            **kwargs,
        )
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return FlashLiteSeq2SeqLMOutput(loss=loss, logits=logits, **fields)


class FlashLiteForCausalLM(FlashLiteHeadModel, GenerationMixin):
    """The decoder with a language-model head; no encoder, no unused parameter."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: FlashLiteConfig):
        super().__init__(decoder_only(config))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: FlashLiteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        memory: FlashLiteCache | None = None,
        teacher_ids: torch.LongTensor | None = None,
        teacher_weights: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlashLiteCausalLMOutput:
        r"""Run the model over `[B, T]` tokens; arguments as in [`FlashLiteDecoder`], and:

        Args:
            labels: targets `[B, T]`, equal to `input_ids` and shifted here; -100 is ignored.
            memory: segment memory before this segment; the output's `memory` holds the one after it.
            teacher_ids, teacher_weights: tokens and probabilities `[B, T, k]` of a teacher's cached distributions,
                for a `loss_function` that distils.
            logits_to_keep: compute the logits of so many last positions, or of these positions; 0 means all.

        Returns:
            Loss and logits `[B, T, V]`. A training batch with labels and more than 2^26 logits gets none of them: its
            loss runs over chunks of tokens.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            memory=memory,
            **kwargs,
        )
        shifted = kwargs.pop("shift_labels", None)
        if labels is not None and shifted is None:
            shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        loss, logits = self._head(
            outputs.last_hidden_state,
            shifted,
            logits_to_keep,
            teacher_ids=teacher_ids,
            teacher_weights=teacher_weights,
            **kwargs,
        )
        return FlashLiteCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            memory=outputs.memory,
        )


def decoder_only(config: FlashLiteConfig) -> FlashLiteConfig:
    """A copy of `config` without an encoder, or `config` itself where it has none."""
    if not config.is_encoder_decoder:
        return config
    config = copy.deepcopy(config)
    config.is_encoder_decoder, config.encoder = False, None
    return config


class FlashLiteTaskModel(FlashLitePreTrainedModel):
    """A model whose head reads the decoder's states of the input itself.

    With an encoder, the decoder reads the same tokens again with the encoder's states in its softmax, so that every
    state has seen the whole input; without one, a state has seen the tokens up to its own.
    """

    _head_name = "score"

    def __init__(self, config: FlashLiteConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FlashLiteModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout_rate)
        setattr(self, self._head_name, nn.Linear(config.decoder.hidden_size, self.num_labels))
        self.post_init()

    def _run(self, input_ids, attention_mask, inputs_embeds, **kwargs):
        """Outputs of the base model, and the head's scores `[B, T, labels]` of each token."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if self.config.is_encoder_decoder:
            if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
                kwargs.update(decoder_input_ids=input_ids, decoder_inputs_embeds=inputs_embeds)
                kwargs.setdefault("decoder_attention_mask", attention_mask)
        else:
            kwargs = {name: value for name, value in kwargs.items() if not name.startswith(("decoder_", "encoder_"))}
        outputs = self.model(**inputs, **kwargs)
        return outputs, getattr(self, self._head_name)(self.dropout(outputs.last_hidden_state))


def task_output(outputs, seq2seq_class, plain_class, **fields):
    """Fill the output class that fits the base model's `outputs`."""
    output_class = seq2seq_class if isinstance(outputs, FlashLiteModelOutput) else plain_class
    for name in output_class.__dataclass_fields__:
        if name not in fields and outputs.get(name) is not None:
            fields[name] = outputs[name]
    return output_class(**fields)


@dataclass
class FlashLiteTokenClassifierOutput(Seq2SeqSequenceClassifierOutput):
    """Scores of each token in `logits` `[B, T, labels]`, with the states of encoder and decoder."""


class FlashLiteForSequenceClassification(FlashLiteTaskModel):
    """Scores of a whole sequence, read at its last token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqSequenceClassifierOutput | SequenceClassifierOutputWithPast:
        outputs, scores = self._run(
            input_ids,
            attention_mask,
            inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            **kwargs,
        )
        given = decoder_input_ids is not None or decoder_inputs_embeds is not None
        own = self.config.is_encoder_decoder and given
        last = self._last_token(
            *((decoder_input_ids, decoder_attention_mask) if own else (input_ids, attention_mask)), scores
        )
        logits = scores[torch.arange(len(scores), device=scores.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return task_output(
            outputs, Seq2SeqSequenceClassifierOutput, SequenceClassifierOutputWithPast, loss=loss, logits=logits
        )

    def _last_token(self, tokens, mask, scores) -> torch.Tensor | int:
        """Column `[B]` of the last real token, on whichever side the padding is."""
        pad = self.config.pad_token_id
        if mask is None and tokens is not None and pad is not None:
            mask = tokens != pad
        if mask is None:
            if len(scores) > 1 and tokens is not None:
                raise ValueError(
                    f"A batch of {len(scores)} rows has neither an attention mask nor a `pad_token_id`, so their last "
                    "tokens are unknown; give one of them."
                )
            return -1
        return (torch.arange(scores.shape[1], device=scores.device) * mask).argmax(-1)


class FlashLiteForTokenClassification(FlashLiteTaskModel):
    """Scores of every token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlashLiteTokenClassifierOutput | TokenClassifierOutput:
        outputs, logits = self._run(
            input_ids,
            attention_mask,
            inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            **kwargs,
        )
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return task_output(outputs, FlashLiteTokenClassifierOutput, TokenClassifierOutput, loss=loss, logits=logits)


class FlashLiteForQuestionAnswering(FlashLiteTaskModel):
    """Scores of the first and last token of an answer in the input (extractive)."""

    _head_name = "qa_outputs"

    def __init__(self, config: FlashLiteConfig):
        config.num_labels = 2
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqQuestionAnsweringModelOutput | QuestionAnsweringModelOutput:
        outputs, scores = self._run(
            input_ids,
            attention_mask,
            inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            **kwargs,
        )
        start_logits, end_logits = scores[..., 0].contiguous(), scores[..., 1].contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return task_output(
            outputs,
            Seq2SeqQuestionAnsweringModelOutput,
            QuestionAnsweringModelOutput,
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
        )


__all__ = [
    "FlashLiteDecoder",
    "FlashLiteEncoder",
    "FlashLiteForCausalLM",
    "FlashLiteForConditionalGeneration",
    "FlashLiteForQuestionAnswering",
    "FlashLiteForSequenceClassification",
    "FlashLiteForTokenClassification",
    "FlashLiteModel",
    "FlashLitePreTrainedModel",
]
