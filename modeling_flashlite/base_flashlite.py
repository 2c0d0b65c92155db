# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""What all Flash-Lite models share: initialization, loading, saving, the loss hook, and validation of inputs."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .compat_flashlite import named_arguments
from .configuration_flashlite import FlashLiteConfig
from .layers_flashlite import FlashLiteAttention, FlashLiteRMSNorm
from .quantization_flashlite import use_this_quantizer
from .saving_flashlite import AtomicSaving


class FlashLitePreTrainedModel(AtomicSaving, PreTrainedModel):
    """Initialisation, loading and saving, common to all Flash-Lite models."""

    config: FlashLiteConfig
    config_class = FlashLiteConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlashLiteEncoderLayer", "FlashLiteDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values", "memory", "context"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_context_parallel = False
    # every head divides its loss by the Trainer's `num_items_in_batch`
    accepts_loss_kwargs = True
    # arguments in the signature of an assigned loss hook; transformers' default hooks have none that matter here
    _loss_arguments: frozenset[str] = frozenset()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load like [`PreTrainedModel.from_pretrained`]; coded layers are of this copy of the code."""
        use_this_quantizer()
        return super().from_pretrained(*args, **kwargs)

    def __setattr__(self, name, value):
        if name == "loss_function" and isinstance(value, nn.Module):
            raise TypeError(
                f"`loss_function` is a {type(value).__name__}, an nn.Module: its weights would enter the checkpoint "
                "and it would be ignored; assign a plain callable such as a function or a dataclass."
            )
        super().__setattr__(name, value)
        if name == "loss_function":
            super().__setattr__("_loss_arguments", named_arguments(value))

    def _loss(self, arguments: dict, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None):
        """Call the loss hook with `arguments`, which contain `labels` (-100 is ignored) under any name.

        With `num_items_in_batch`, the loss is this batch's share of the mean over that many labels. A hook without
        this argument returns the mean over its own labels, which is rescaled here.
        """
        if "num_items_in_batch" in self._loss_arguments:
            return self.loss_function(num_items_in_batch=num_items_in_batch, **arguments)
        loss = self.loss_function(**arguments)
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss * ((labels != -100).sum().to(loss.device) / num_items_in_batch)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, FlashLiteAttention):
            for name in ("position_bias", "content_bias"):
                if hasattr(module, name):
                    init.zeros_(getattr(module, name))
        elif isinstance(module, FlashLiteRMSNorm) and module.offset:
            init.constant_(module.weight, 1.0 - module.offset)

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
    """Validate the inputs.

    Raises:
        ValueError: for none or two inputs, an empty sequence, ids outside the vocabulary, or a mask of a wrong shape.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Got both or neither of `input_ids` and `inputs_embeds`; give exactly one of them.")
    batch, columns = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
    if columns == 0:
        raise ValueError("The sequence is empty (0 tokens); give at least one token, such as the start token.")
    # reading values would synchronize an accelerator, whose embedding kernel checks ids itself, and break a graph
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
                f"The attention mask has shape {shape}, but {' or '.join(map(str, sorted(set(allowed))))} is needed; "
                "give one entry per token, 1 for real tokens and 0 for padding."
            )
