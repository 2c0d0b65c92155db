# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Flash-Lite: a dense bidirectional encoder and a sparse decoder with multi-axis attention and segment memory.

Shapes: B batch, T target columns, S source columns or key slots, N query heads, M key-value heads, H head size,
D hidden size, E embedding size, V vocabulary.
"""

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .base_flashlite import FlashLitePreTrainedModel
from .cache_flashlite import FlashLiteCache
from .compat_flashlite import CACHE, CacheNames, check_arguments, named_arguments, takes_cache
from .configuration_flashlite import FlashLiteConfig
from .decode_flashlite import decode_session, decoding
from .int8_flashlite import int8_codes
from .linear_flashlite import Linear
from .loss_flashlite import chunked_cross_entropy

# imported for registration, so that coded checkpoints load wherever this file does
from .quantization_flashlite import EcqConfig  # noqa: F401
from .stacks_flashlite import FlashLiteDecoder, FlashLiteDecoderOutput, FlashLiteEncoder

logger = logging.get_logger(__name__)

# above this many elements, training logits are not materialized: the loss runs over chunks of tokens
_MAX_TRAINING_LOGITS = 2**20


@dataclass
class FlashLiteModelOutput(CacheNames, Seq2SeqModelOutput):
    """What the encoder-decoder returns; `memory` is the decoder's segment memory, where one was given."""

    memory: FlashLiteCache | None = None


@dataclass
class FlashLiteCausalLMOutput(CacheNames, CausalLMOutputWithPast):
    """What the decoder-only language model returns; `memory` is its segment memory, where one was given."""

    memory: FlashLiteCache | None = None


@dataclass
class FlashLiteSeq2SeqLMOutput(CacheNames, Seq2SeqLMOutput):
    """What the sequence-to-sequence model returns; `memory` is the decoder's segment memory, where one was given."""

    memory: FlashLiteCache | None = None


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
        # the table that the others are tied to, as tools such as peft expect
        of_encoder = self.config.is_encoder_decoder and not self.config.tie_word_embeddings
        return (self.encoder if of_encoder else self.decoder).embed_tokens

    def set_input_embeddings(self, new_embeddings):
        if self.config.is_encoder_decoder:
            self.encoder.embed_tokens = new_embeddings
        if not self.config.is_encoder_decoder or self.config.tie_word_embeddings:
            self.decoder.embed_tokens = new_embeddings

    def new_memory(self) -> FlashLiteCache:
        """An empty segment memory, to be passed as `memory` with the first segment."""
        return FlashLiteCache(self.config)

    @takes_cache
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
            past_key_values: cache of the target tokens before; it grows in place. It may be called `cache` too.
            use_cache: whether to return (and make) a cache.
            memory: the decoder's segment memory before this segment; the output's `memory` holds the one after it.
        """
        check_arguments(self, kwargs, packed=position_ids is not None)
        recorded = self._recorded(kwargs)
        recorded["return_dict"] = True
        own = {CACHE: past_key_values, "use_cache": use_cache, "memory": memory, **recorded}
        if not self.config.is_encoder_decoder:
            self._refuse_encoder_arguments(
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                decoder_position_ids=decoder_position_ids,
                encoder_outputs=encoder_outputs,
                decoder_inputs_embeds=decoder_inputs_embeds,
            )
            outputs = decoding(self.decoder)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **own,
            )
            # the recorded entry is empty without an encoder
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
                **recorded,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        outputs = decoding(self.decoder)(
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
            **{CACHE: outputs.get(CACHE)},
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            memory=outputs.memory,
        )

    def _recorded(self, kwargs: dict) -> dict:
        """Which states the stacks record: the arguments, or else the config."""
        names = "output_attentions", "output_hidden_states"
        asked = {name: kwargs.get(name) for name in names}
        return {name: getattr(self.config, name) if value is None else value for name, value in asked.items()}

    def _refuse_encoder_arguments(self, **arguments) -> None:
        for name in (name for name, value in arguments.items() if value is not None):
            raise ValueError(
                f"`{name}` is given, but this model has no encoder; its tokens go into `input_ids`, and what belongs "
                "to them into `attention_mask` and `position_ids`."
            )


def shift_tokens_right(labels: torch.Tensor, config: FlashLiteConfig) -> torch.Tensor:
    """Decoder inputs of `labels` `[B, T]`: the start token, then all labels but the last; -100 becomes padding."""
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise ValueError(
            f"`decoder_start_token_id` is {start} and `pad_token_id` {pad}, but decoder inputs are made from both; "
            "set them in the config."
        )
    shifted = labels.roll(1, dims=-1)
    shifted[..., 0] = start
    return shifted.masked_fill(shifted == -100, pad)


def kept_states(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The states `[B, T, D]` whose logits are requested.

    `logits_to_keep` is the number of last positions (0: all), positions `[P]` of every row or `[B, P]` of each, or a
    mask (bool `[B, T]`), whose states come in one row, `[P, D]`.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dim() == 2 and logits_to_keep.dtype != torch.bool:
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[logits_to_keep] if logits_to_keep.dim() == 2 else hidden_states[:, logits_to_keep]


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
            self.head_proj = Linear(stack.hidden_size, stack.embedding_size, bias=False)
        self.lm_head = Linear(stack.embedding_size, stack.vocab_size, bias=False)
        self.loss_function = chunked_cross_entropy
        self.post_init()

    def new_memory(self) -> FlashLiteCache:
        """An empty segment memory, to be passed as `memory` with the first segment."""
        return self.model.new_memory()

    def generate(self, *args, **kwargs):
        """[`GenerationMixin.generate`], decoding by one [`DecodeSession`] for the whole generation.

        transformers enters `_optimize_model_for_decode` around sampling only: before version 5.24, beams and drafts
        would decode without a session, and a draft model would open a new one for each draft.
        """
        with decode_session(self):
            return super().generate(*args, **kwargs)

    @contextlib.contextmanager
    def _optimize_model_for_decode(self):
        # not for prompts, which run once: preparation costs as much as unpacking twenty times
        with super()._optimize_model_for_decode(), decode_session(self) as session, int8_codes(session.int8_codes):
            yield

    def loss_and_logits(self, hidden_states, labels, logits_to_keep, teacher, kwargs):
        """Loss and logits of the decoder's states `[B, T, D]`; `labels` `[B, T]` are aligned with them.

        For training batches with many logits, none are returned: the loss runs over chunks of tokens.
        """
        if self.head_proj is not None:
            hidden_states = self.head_proj(hidden_states)
        if self.config.decoder.logits_scaling != 1:
            hidden_states = hidden_states / self.config.decoder.logits_scaling
        vocab_size = self.config.decoder.vocab_size
        chunked = "lm_head" in self._loss_arguments  # the hook applies the head itself
        if labels is None:
            self._check_labels_are_not_missed(kwargs)
            return None, self.lm_head(kept_states(hidden_states, logits_to_keep))
        large = hidden_states.shape[:-1].numel() * vocab_size > _MAX_TRAINING_LOGITS
        logits = None
        if not (self.training and chunked and large):
            logits = self.lm_head(kept_states(hidden_states, logits_to_keep))
        whole = logits is not None and logits.shape[:2] == hidden_states.shape[:2]
        own = {"hidden_states": hidden_states, "lm_head": self.lm_head} if chunked else {"shift_labels": labels}
        own |= {name: value for name, value in kwargs.items() if name in self._loss_arguments - {"num_items_in_batch"}}
        teacher = {name: value for name, value in teacher.items() if value is not None}
        if teacher.keys() - self._loss_arguments:
            logger.warning_once(
                f"{' and '.join(teacher)} are given, but the loss function does not read them; to distil, set "
                "`model.loss_function = KDLoss()`."
            )
        logits_read = logits if whole or not chunked else None
        arguments = {"logits": logits_read, "labels": labels, "vocab_size": vocab_size, **own, **teacher}
        return self._loss(arguments, labels, kwargs.get("num_items_in_batch")), logits

    def _check_labels_are_not_missed(self, kwargs: dict) -> None:
        """Refuse a step of a `Trainer` that withholds the labels, so that the loss hook would not be called."""
        taught = kwargs.get("teacher_ids") is not None or kwargs.get("teacher_weights") is not None
        hooked = self.loss_function is not chunked_cross_entropy and kwargs.get("num_items_in_batch") is not None
        if taught or hooked:
            raise ValueError(
                "No `labels` arrive at the model, so its `loss_function` cannot be called: the Trainer keeps them "
                "under `label_smoothing_factor` or `compute_loss_func`; set neither, or use `DistillationTrainer`."
            )


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

    @takes_cache
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
            Loss and logits `[B, T, V]`. A training batch with labels and more than 2^20 logits gets none of them: its
            loss runs over chunks of tokens.
        """
        check_arguments(self, kwargs, self._loss_arguments, packed=position_ids is not None)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = shift_tokens_right(labels, self.config)
        given = (labels, decoder_input_ids, decoder_inputs_embeds)
        if kwargs.get("num_items_in_batch") is not None and all(value is None for value in given):
            raise ValueError(
                "Neither `labels` nor `decoder_input_ids` arrive at the model: the Trainer keeps the labels under "
                "`label_smoothing_factor` or `compute_loss_func`; use a collator that knows the model, "
                "`PaddingCollator(tokenizer, model=model)` or `DataCollatorForSeq2Seq(tokenizer, model)`."
            )
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
            **{CACHE: past_key_values},
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            memory=memory,
            return_dict=True,
            **self.model._recorded(kwargs),
        )
        teacher = {"teacher_ids": teacher_ids, "teacher_weights": teacher_weights}
        loss, logits = self.loss_and_logits(outputs.last_hidden_state, labels, logits_to_keep, teacher, kwargs)
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return FlashLiteSeq2SeqLMOutput(loss=loss, logits=logits, **fields)


class FlashLiteForCausalLM(FlashLiteHeadModel, GenerationMixin):
    """The decoder with a language-model head; no encoder, no unused parameter."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: FlashLiteConfig):
        super().__init__(decoder_only(config))

    @takes_cache
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
            Loss and logits `[B, T, V]`. A training batch with labels and more than 2^20 logits gets none of them: its
            loss runs over chunks of tokens.
        """
        # not a named argument, which the Trainer would treat as a label required in every batch
        shifted = kwargs.pop("shift_labels", None)
        check_arguments(self, kwargs, self._loss_arguments, packed=position_ids is not None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            memory=memory,
            return_dict=True,
            **self.model._recorded(kwargs),
        )
        if labels is not None and shifted is None:
            shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        teacher = {"teacher_ids": teacher_ids, "teacher_weights": teacher_weights}
        loss, logits = self.loss_and_logits(outputs.last_hidden_state, shifted, logits_to_keep, teacher, kwargs)
        return FlashLiteCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            memory=outputs.memory,
        )


def decoder_only(config: FlashLiteConfig) -> FlashLiteConfig:
    """A copy of `config` without an encoder, or `config` itself if it has none."""
    if not config.is_encoder_decoder:
        return config
    config = copy.deepcopy(config)
    config.is_encoder_decoder, config.encoder = False, None
    return config


# keyword arguments that the task heads pass on
_MODEL_ARGUMENTS = named_arguments(FlashLiteModel.forward) | {"output_attentions", "output_hidden_states"}


class FlashLiteTaskModel(FlashLitePreTrainedModel):
    """A model whose head reads the decoder's states of the input itself.

    With an encoder, the decoder reads the same tokens again with the encoder's states in its softmax, so that every
    state depends on the whole input; without one, a state depends on the tokens up to its own.
    """

    _head_name = "score"

    def __init__(self, config: FlashLiteConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FlashLiteModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout_rate)
        setattr(self, self._head_name, Linear(config.decoder.hidden_size, self.num_labels))
        self.post_init()

    def _run(self, input_ids, attention_mask, inputs_embeds, **kwargs):
        """Outputs of the base model, and the head's scores `[B, T, labels]` of each token."""
        known = _MODEL_ARGUMENTS | self._loss_arguments
        check_arguments(self, kwargs, known, packed=kwargs.get("position_ids") is not None)
        kwargs = {name: value for name, value in kwargs.items() if name in _MODEL_ARGUMENTS}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        given = kwargs.get("decoder_input_ids") is not None or kwargs.get("decoder_inputs_embeds") is not None
        if self.config.is_encoder_decoder and not given:
            kwargs.update(decoder_input_ids=input_ids, decoder_inputs_embeds=inputs_embeds)
            if kwargs.get("decoder_attention_mask") is None:
                kwargs["decoder_attention_mask"] = attention_mask
        outputs = self.model(**inputs, return_dict=True, **kwargs)
        return outputs, getattr(self, self._head_name)(self.dropout(outputs.last_hidden_state))


def task_output(outputs, seq2seq_class, plain_class, **fields):
    """Build the output class that matches the base model's `outputs`."""
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
            arguments = {"logits": logits, "labels": labels, "pooled_logits": logits, "config": self.config}
            loss = self._loss(arguments, labels, kwargs.get("num_items_in_batch"))
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
        loss = None
        if labels is not None:
            arguments = {"logits": logits, "labels": labels, "config": self.config}
            loss = self._loss(arguments, labels, kwargs.get("num_items_in_batch"))
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
            arguments = {"start_logits": start_logits, "end_logits": end_logits}
            arguments |= {"start_positions": start_positions, "end_positions": end_positions}
            loss = self._loss(arguments, start_positions, kwargs.get("num_items_in_batch"))
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
