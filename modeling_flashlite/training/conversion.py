# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Conversion of pre-trained decoders to Flash-Lite and back: the same tensors, bit for bit, under other names.

A converted model computes the same function as its parent as long as the axes cover the text, and reads longer texts
sparsely. Weights are read and checked one by one, so that only one copy is in memory.
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..configuration_flashlite import FlashLiteConfig, FlashLiteEncoderConfig
from ..modeling_flashlite import FlashLiteForCausalLM, FlashLiteForConditionalGeneration
from .converted_files import check_output, staged, write_checkpoint
from .families import ConversionError, check_decoder, flashlite_config, one_line, parent_config, weight_names
from .source import Source, open_source

__all__ = ["convert", "convert_back", "parent_of", "to_encoder_decoder", "transplant"]

# buffers in old checkpoints
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def convert(
    model: PreTrainedModel | str | Path,
    *,
    output: str | Path | None = None,
    max_length: int | None = None,
    **axes: Any,
) -> FlashLiteForCausalLM:
    """Convert a pre-trained decoder to Flash-Lite: the same weights, bit for bit, in their original types.

    As long as the axes cover the text (the first `(relevance_top_k + 3) * block_size` tokens), the converted model
    computes the same function as its parent; longer texts are read sparsely.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): a model in memory, a folder, a `.gguf` file (dequantized to
            float32), or a Hub id. Families: Llama, Mistral, Qwen2, Qwen3, SmolLM3, Granite, OLMo 2, Gemma 3 (text).
        output (`str` or `Path`, *optional*): folder for the converted checkpoint with tokenizer, chat template,
            generation settings and a card; it must not exist, or be empty.
        max_length (`int`, *optional*): tokens of the longest text that the model is meant for;
            `max_position_embeddings` if unset.
        **axes: fields of the sparse attention (`relevance_top_k`, `memory_blocks`, `block_size`, ...); by default
            chosen from the length that the parent was trained for, see [`families.default_axes`].

    Returns:
        [`FlashLiteForCausalLM`]: with the parent's generation settings, in evaluation mode.

    Raises:
        ConversionError: a family or a feature that cannot be converted; missing, extra, misshapen, pickled or damaged
            weights; an output folder that is not empty. Nothing is left half-written.
    """
    if output is not None:
        check_output(output)
    source = open_source(model, max_length)
    converted = transplant(source, max_length, **axes)
    if output is not None:
        with staged(output) as folder:
            write_checkpoint(converted, source, folder)
    return converted


def transplant(source: Source, max_length: int | None = None, **axes: Any) -> FlashLiteForCausalLM:
    """The Flash-Lite model with the weights of a source; see [`convert`]."""
    config = flashlite_config(source.config, max_length, **axes)
    layers = source.config.num_hidden_layers
    if layers > len(source.shapes):  # before so many are built
        raise ConversionError(f"{source.name} has {len(source.shapes)} weights, too few for {layers} layers.")
    names = weight_names(source.config)
    with torch.device("meta"):
        model = FlashLiteForCausalLM(config)
    places = _check_names(source, names, {name: tuple(x.shape) for name, x in model.state_dict().items()})
    weights = {}
    for theirs, ours in tqdm(places.items(), desc="weights", unit="tensor"):
        weights[ours] = _read(source, theirs)
    if source.config.tie_word_embeddings:
        table = weights["model.decoder.embed_tokens.weight"]
        head = weights.setdefault("lm_head.weight", table)
        if head is not table and not torch.equal(head, table):
            raise ConversionError(
                f"`tie_word_embeddings` is True in {source.name}, but lm_head.weight differs from the embeddings; set "
                "it to False in config.json."
            )
        weights["lm_head.weight"] = table
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.config.dtype = weights["model.decoder.embed_tokens.weight"].dtype
    if source.generation_config is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
        # kinds of caches of the parent, in place of which the model has its own
        model.generation_config.cache_implementation = model.generation_config.cache_config = None
    return model.eval()


def _read(source: Source, name: str) -> torch.Tensor:
    try:
        weight = source.read(name)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{name} of {source.name} cannot be read: {one_line(error)}") from error
    if weight.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ConversionError(f"{name} of {source.name} is {weight.dtype}, but weights are one of {known}.")
    if not torch.isfinite(weight).all():
        raise ConversionError(f"{name} of {source.name} holds NaN or infinity; the checkpoint is damaged.")
    return weight


def _check_names(source: Source, names: dict[str, str], shapes: dict[str, tuple]) -> dict[str, str]:
    """Map the weights to read to their names in Flash-Lite; missing, extra and misshapen ones are refused."""
    optional = {"lm_head.weight"} if source.config.tie_word_embeddings else set()
    there = {name for name in source.shapes if not _IGNORED.fullmatch(name)}
    missing, extra = sorted(set(names) - there - optional), sorted(there - set(names))
    if missing or extra:
        what, name = ("lacks", missing[0]) if missing else ("has the unknown weight", extra[0])
        count = len(missing or extra)
        others = f" and {count - 1} more" if count > 1 else ""
        raise ConversionError(f"{source.name} {what} {name}{others}; its config does not describe its weights.")
    for theirs in names:
        if theirs in there and source.shapes[theirs] != shapes[names[theirs]]:
            raise ConversionError(
                f"{theirs} of {source.name} is {list(source.shapes[theirs])}, but its config says "
                f"{list(shapes[names[theirs]])}; one of them is wrong."
            )
    return {theirs: ours for theirs, ours in names.items() if theirs in there}


def parent_of(model: FlashLiteForCausalLM, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the parent's class that shares its tensors with the converted model."""
    weights = model.state_dict()
    with torch.device("meta"):
        parent = AutoModelForCausalLM.from_config(config)
    names = weight_names(config)
    if missing := sorted(set(weights) - set(names.values())):
        raise ConversionError(f"{config.model_type} has no place for {missing[0]}.")
    parent.load_state_dict({theirs: weights[ours] for theirs, ours in names.items()}, assign=True)
    parent.tie_weights()
    return _with_buffers(parent).eval()


def _with_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """Rebuild the buffers of a model created on the meta device, from its config."""
    with torch.device("cpu"):
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RotaryEmbedding"):
                model.set_submodule(name, type(module)(model.config))
            elif hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.nn.Buffer(torch.tensor(module.scalar_embed_scale), persistent=False)
    return model


def convert_back(model: FlashLiteForCausalLM, model_type: str = "llama") -> PreTrainedModel:
    """A model of another family that computes the same as this one with full attention, and shares its tensors.

    Raises:
        ConversionError: where that family cannot express the model; the message names the field.
    """
    check_decoder(model.config, type(model).__name__, "The model")
    parent = parent_of(model, parent_config(model.config, model_type))
    parent.config.dtype = model.config.dtype
    parent.generation_config = copy.deepcopy(model.generation_config)
    return parent


def to_encoder_decoder(model: FlashLiteForCausalLM) -> FlashLiteForConditionalGeneration:
    """Build an encoder-decoder from a decoder without new weights, in the layout of T5Gemma 2 (arXiv 2512.14856).

    The encoder gets a copy of the decoder's weights and attends in both directions. The decoder attends to the
    encoder's states through its own projections, in the same softmax. The embeddings are shared.

    Args:
        model ([`FlashLiteForCausalLM`]): a decoder; its tensors are reused by the new decoder.

    Returns:
        [`FlashLiteForConditionalGeneration`]: in evaluation mode; it needs training.
    """
    check_decoder(model.config, type(model).__name__, "The model")
    config = copy.deepcopy(model.config)
    stack = config.decoder.to_dict()
    shared = {name: stack[name] for name in FlashLiteEncoderConfig.__dataclass_fields__ if name in stack}
    fresh = FlashLiteConfig(
        encoder={**shared, "is_decoder": False},
        decoder=config.decoder,
        is_encoder_decoder=True,
        tie_word_embeddings=config.tie_word_embeddings,
        decoder_start_token_id=_start_token(config.decoder),
    )
    with torch.device("meta"):
        new = FlashLiteForConditionalGeneration(fresh)
    weights = model.state_dict()
    for name in list(weights):
        if name.startswith("model.decoder.") and ".decoder.embed_tokens." not in name:
            weights[name.replace("model.decoder.", "model.encoder.", 1)] = weights[name].clone()
    # tied below, or the encoder's own where the head is not tied
    weights["model.encoder.embed_tokens.weight"] = weights["model.decoder.embed_tokens.weight"]
    new.load_state_dict(weights, assign=True)
    new.tie_weights()
    new.config.dtype = model.config.dtype
    new.generation_config = GenerationConfig.from_model_config(new.config)
    new.generation_config.eos_token_id = model.generation_config.eos_token_id
    return new.eval()


def _start_token(config) -> int | None:
    """The start token of decoder inputs: the first special token that is defined, of bos, pad and eos."""
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return next((token for token in (config.bos_token_id, config.pad_token_id, end) if token is not None), None)
