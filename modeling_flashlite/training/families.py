# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Model families of transformers that Flash-Lite can express, and how their config fields and weights map.

Families differ from Llama in config fields only: Flash-Lite has a field for each difference, off by default. A feature
without a field is refused by name.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..configuration_flashlite import FlashLiteConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
# fields with the same name and meaning everywhere
_COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# the values of these fields in a plain Llama
_LLAMA = {
    "attention_bias": False,
    "qkv_bias": False,
    "mlp_bias": False,
    "qk_norm": None,
    "norm_placement": "pre",
    "rms_norm_offset": 0.0,
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "no_rope_layers": None,
    "rope_local_base_freq": None,
    "local_rope_layers": None,
}
_LAYER_NORMS = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"}


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message states the reason and the fix."""


def check_decoder(config: FlashLiteConfig, kind: str, name: str) -> None:
    """Refuse a Flash-Lite model that is no float decoder with a language-model head, before it is changed.

    Args:
        config (`FlashLiteConfig`): of the model.
        kind (`str`): name of its class.
        name (`str`): what the message calls it.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(f"{name} is quantized; dequantize() and save it first.")
    if config.is_encoder_decoder or kind != "FlashLiteForCausalLM":
        raise ConversionError(f"{name} is a {kind}, whose encoder or head would be lost; give a FlashLiteForCausalLM.")


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


@dataclass(frozen=True)
class Family:
    """One family, by its `model_type`.

    Args:
        copied: fields beyond the common ones, the family's name to ours.
        fixed: fields of Flash-Lite whose value the family decides, or a function of the family's config.
        restored: fields of the family that `copied` cannot restore, as functions of Flash-Lite's decoder config.
        norms: the norms of a layer, the family's name to ours.
    """

    copied: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    restored: Mapping[str, Callable] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=lambda: _LAYER_NORMS)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


FAMILIES = {
    "llama": Family(_same("attention_bias", "mlp_bias")),
    "mistral": Family(restored={"sliding_window": lambda config: None}),
    "qwen2": Family(fixed={"qkv_bias": True}),
    "qwen3": Family(_same("attention_bias"), {"qk_norm": "head"}),
    "smollm3": Family(
        _same("attention_bias", "mlp_bias", "no_rope_layers"),
        restored={"no_rope_layers": lambda config: config.no_rope_layers or [1] * config.num_hidden_layers},
    ),
    "granite": Family(
        _same(
            "attention_bias",
            "mlp_bias",
            "embedding_multiplier",
            "attention_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
        restored={
            "embedding_multiplier": lambda config: _embedding_multiplier(config),
            "attention_multiplier": lambda config: _attention_multiplier(config),
        },
    ),
    "olmo2": Family(
        _same("attention_bias"),
        {"qk_norm": "projection", "norm_placement": "post"},
        norms={
            "post_attention_layernorm": "attention_output_norm",
            "post_feedforward_layernorm": "mlp_output_norm",
        },
    ),
    "gemma3_text": Family(
        {"hidden_activation": "hidden_act", **_same("attention_bias")},
        {
            "qk_norm": "head",
            "norm_placement": "both",
            "rms_norm_offset": 1.0,
            # the family stores it in float32
            "embedding_multiplier": lambda config: torch.tensor(config.hidden_size**0.5).item(),
            "attention_multiplier": lambda config: config.query_pre_attn_scalar**-0.5,
            "rope_parameters": lambda config: copy.deepcopy(config.rope_parameters["full_attention"]),
            "rope_local_base_freq": lambda config: config.rope_parameters["sliding_attention"]["rope_theta"],
            "local_rope_layers": lambda config: [int(kind == "sliding_attention") for kind in config.layer_types],
        },
        {
            "query_pre_attn_scalar": lambda config: round(_attention_multiplier(config) ** -2),
            "layer_types": lambda config: [
                ("full" if kind is None else "sliding") + "_attention" for kind in config.rope_kinds
            ],
            "rope_parameters": lambda config: _two_ropes(config),
            # as long as the trained length, so that it never applies
            "sliding_window": lambda config: config.max_position_embeddings,
        },
        {
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "attention_output_norm",
            "pre_feedforward_layernorm": "post_attention_layernorm",
            "post_feedforward_layernorm": "mlp_output_norm",
        },
    ),
}


def _embedding_multiplier(config) -> float:
    return config.embedding_size**0.5 if config.embedding_multiplier is None else config.embedding_multiplier


def _two_ropes(config) -> dict:
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq or config.rope_parameters["rope_theta"]}
    return {"full_attention": copy.deepcopy(config.rope_parameters), "sliding_attention": local}


def _attention_multiplier(config) -> float:
    return config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier


def family_of(config: PreTrainedConfig, max_length: int | None = None) -> Family:
    """The family of a config.

    Args:
        config (`PreTrainedConfig`): of the checkpoint to convert.
        max_length (`int`, *optional*): tokens of the longest text that the converted model is meant for;
            `max_position_embeddings` if unset. Attention windows must not be shorter.

    Raises:
        ConversionError: for an unknown family, or a feature that Flash-Lite cannot express.
    """
    known = ", ".join(FAMILIES)
    if config.model_type not in FAMILIES:
        raise ConversionError(f"{config.model_type} cannot be converted; supported families are {known}.")
    length = config.max_position_embeddings if max_length is None else max_length
    if not isinstance(length, int) or length < 1:
        raise ConversionError(f"The longest text has {length!r} tokens, but a model reads at least 1.")
    for problem in _problems(config, length):
        raise ConversionError(f"This {config.model_type} has {problem}, which a Flash-Lite model cannot express.")
    return FAMILIES[config.model_type]


def _problems(config, length: int):
    """Features of a config that have no field in Flash-Lite, as noun phrases."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            yield f"soft caps (`{name}` is {getattr(config, name)})"
    if getattr(config, "use_bidirectional_attention", False):
        yield "bidirectional attention (`use_bidirectional_attention`)"
    if getattr(config, "quantization_config", None) is not None:
        yield "quantized weights (`quantization_config`)"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and "sliding_attention" in types and window < length:
        yield f"attention windows of {window} tokens (give max_length={window} if no text is longer)"
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        yield f"`pad_token_id` {config.pad_token_id} beyond its {config.vocab_size} tokens"
    if config.rope_parameters is None:
        yield "no `rope_parameters`"
        return
    local = config.rope_parameters.get("sliding_attention", {}).get("rope_type", "default")
    if local != "default":
        yield f"rotary embeddings of the type {local} in its local layers"
    for rope in _ropes(config.rope_parameters):
        if rope["rope_type"] not in ROPE_TYPES:
            yield f"rotary embeddings of the type {rope['rope_type']}"
        factor = rope.get("partial_rotary_factor")
        if factor not in (None, 1.0):
            yield f"rotary embeddings of a part of each head (`partial_rotary_factor` is {factor})"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACT2FN:
        yield f"the activation {activation!r}"


def _ropes(parameters: dict) -> list[dict]:
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def flashlite_config(config: PreTrainedConfig, max_length: int | None = None, **axes) -> FlashLiteConfig:
    """The Flash-Lite config of a parent's config, with the axes of [`default_axes`] where `axes` do not name them.

    Raises:
        ConversionError: see [`family_of`].
    """
    family = family_of(config, max_length)
    fields = {name: copy.deepcopy(getattr(config, name, None)) for name in _COMMON}
    if fields["head_dim"] is None:
        fields["head_dim"] = config.hidden_size // config.num_attention_heads
    fields |= _LLAMA
    fields |= {ours: copy.deepcopy(getattr(config, theirs)) for theirs, ours in family.copied.items()}
    fields |= {name: value(config) if callable(value) else value for name, value in family.fixed.items()}
    if fields["no_rope_layers"] is not None and all(fields["no_rope_layers"]):
        fields["no_rope_layers"] = None
    default = default_axes(max_length or config.max_position_embeddings, axes.get("block_size") or 8)
    if unknown := sorted(set(axes) - set(default)):
        raise ConversionError(f"The sparse attention has no field {unknown[0]!r}; it has {', '.join(default)}.")
    axes = {**default, **axes}
    try:
        return FlashLiteConfig(
            **fields,
            **axes,
            position_encoding="rotary",
            rope_dtype="float32",
            is_encoder_decoder=False,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    except Exception as error:  # a field that fits no model; the library wraps what validation raises
        problem = one_line(error.__cause__ or error)
        raise ConversionError(
            f"The config of this {config.model_type} makes no Flash-Lite model: {problem}"
        ) from error


def default_axes(length: int, block_size: int = 8) -> dict[str, int]:
    """Axes for a model that was trained with full attention over `length` tokens.

    For an equal number of keys, small blocks lose least: of 8,192 tokens, 1.1% over full attention with blocks of 8
    and means of 2 tokens (`scripts/studies/long_text.py`). Large blocks prefill faster: attention to 8,192 tokens
    takes twice as long with blocks of 8 as with 16, and a fifth with 64. With `relevance_top_k`, a
    token reads 9% of the trained length, including its own, the previous and the first block, and at least 512, at
    most 4096 tokens beyond these. `memory_blocks` is the largest value for which no distance reaches `length`: once
    the first block has left the window, its positions are shifted to just before the window, which is at most
    `(memory_blocks + 2) * block_size - 1` tokens back.
    """
    read = min(max(9 * length // 100, 512 + 3 * block_size), 4096 + 3 * block_size)
    return {
        "block_size": block_size,
        "sub_block_size": math.gcd(block_size, 2 if block_size <= 8 else 4),
        "relevance_top_k": max(read // block_size - 3, 1),
        "memory_blocks": max(length // block_size - 2, 0),
    }


def dense_length(config: FlashLiteConfig) -> int:
    """Length in tokens up to which attention is full; longer texts are read sparsely."""
    reach = [value + 3 for value in (config.relevance_top_k,) if value is not None]
    reach += [max(value, 1) + 2 for value in (config.memory_blocks,) if value is not None]
    return min(reach) * config.block_size if reach else config.max_position_embeddings


def weight_names(config: PreTrainedConfig) -> dict[str, str]:
    """Flash-Lite's name of every weight of a parent, by the parent's name."""
    family, names = FAMILIES[config.model_type], {}
    with torch.device("meta"):
        parent = AutoModelForCausalLM.from_config(config)
    for name in parent.state_dict():
        names[name] = _rename(name, family.norms)
    return names


def _rename(name: str, norms: Mapping[str, str]) -> str:
    if not name.startswith("model."):
        return name
    parts = name.split(".")
    if parts[1] == "layers" and parts[3] in norms:
        parts[3] = norms[parts[3]]
    return ".".join(["model", "decoder", *parts[1:]])


def parent_config(config: FlashLiteConfig, model_type: str) -> PreTrainedConfig:
    """The config of `model_type` that computes what a decoder-only Flash-Lite config does with full attention.

    Raises:
        ConversionError: where the family cannot express a field; the message names it.
    """
    if model_type not in FAMILIES:
        raise ConversionError(f"{model_type} is not a supported family; choose one of {', '.join(FAMILIES)}.")
    if config.is_encoder_decoder:
        raise ConversionError(f"An encoder-decoder cannot be written as {model_type}, which has no encoder.")
    family, stack = FAMILIES[model_type], config.decoder
    if stack.position_encoding != "rotary" or stack.embedding_size != stack.hidden_size:
        raise ConversionError(
            f"{model_type} needs rotary positions and embeddings as wide as the hidden states, but this model has "
            f"`position_encoding` {stack.position_encoding!r} and `embedding_size` {stack.embedding_size} for "
            f"`hidden_size` {stack.hidden_size}."
        )
    names = {ours: theirs for theirs, ours in family.copied.items()}
    fields = {names.get(name, name): copy.deepcopy(getattr(stack, name)) for name in _COMMON}
    fields |= {theirs: copy.deepcopy(getattr(stack, ours)) for theirs, ours in family.copied.items()}
    fields |= {name: value(stack) for name, value in family.restored.items()}
    parent = CONFIG_MAPPING[model_type](**fields, tie_word_embeddings=config.tie_word_embeddings)
    again = flashlite_config(parent).decoder
    for name in (*_COMMON, *_LLAMA):
        wanted, got = _value(stack, name), _value(again, name)
        if wanted != got and not (isinstance(wanted, float) and math.isclose(wanted, got, rel_tol=1e-12)):
            raise ConversionError(f"`{name}` is {wanted!r} in this model, but {model_type} has {got!r}.")
    return parent


def _value(config, name: str):
    special = {"embedding_multiplier": _embedding_multiplier, "attention_multiplier": _attention_multiplier}
    return special[name](config) if name in special else getattr(config, name)
