# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Configuration of Flash-Lite: one composite config with a dense encoder and a sparse decoder."""

import inspect
from typing import Any

# first, so that an old library gives one clear error instead of a failing import
from .compat_flashlite import CACHE, sub_config_specs  # isort: split

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .lora_targets_flashlite import register_lora_targets

# registers the quantizer: some tools read a config's `quantization_config` before they load the model class
from .quantization_flashlite import EcqConfig  # noqa: F401

POSITION_ENCODINGS = ("transformer_xl", "rotary")
# fields of a converted model with a few possible values
_CHOICES = {
    "position_encoding": POSITION_ENCODINGS,
    "rope_dtype": ("float64", "float32"),
    "qk_norm": (None, "head", "projection"),
    "norm_placement": ("pre", "post", "both"),
}

_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# learned vectors per head are sharded with the head's projections; the attention reads the local part
_TP_PLAN_XL = {
    "layers.*.self_attn": "local_params",
    "layers.*.self_attn.r_proj": "colwise",
    "layers.*.self_attn.content_bias": "colwise",
    "layers.*.self_attn.position_bias": "colwise",
}
# a norm over heads: replicated, and each device has the gradient of its own heads only
_TP_PLAN_HEAD_NORM = {
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
}
# a norm over the whole projection is replicated on every device
_TP_PLAN_PROJECTION_NORM = {
    "layers.*.self_attn.q_proj": "colwise_gather_output",
    "layers.*.self_attn.k_proj": "colwise_gather_output",
    "layers.*.self_attn.v_proj": "colwise_gather_output",
    "layers.*.self_attn.o_proj": "rowwise_split_input",
}
_PP_PLAN = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}


@strict
class FlashLiteStackConfig(PreTrainedConfig):
    r"""Fields common to encoder and decoder.

    Args:
        vocab_size (`int`, defaults to 16000): tokens in the vocabulary.
        hidden_size (`int`, defaults to 384): width D of the residual stream.
        embedding_size (`int`, *optional*): width E of the embedding table; smaller than `hidden_size` factorises it
            (table V x E and a projection E x D). Defaults to `hidden_size`.
        intermediate_size (`int`, *optional*): width of the lite feed-forward network; defaults to 4/3 of
            `hidden_size`, rounded up to a multiple of 16.
        num_hidden_layers (`int`, defaults to 6): layers in the stack.
        num_attention_heads (`int`, defaults to 6): query heads.
        num_key_value_heads (`int`, *optional*): key-value heads; defaults to half of the query heads (a third or all
            of them when that does not divide).
        head_dim (`int`, *optional*): width of a head; defaults to `hidden_size // num_attention_heads`.
        hidden_act (`str`, defaults to `"silu"`): activation of the gate.
        max_position_embeddings (`int`, defaults to 2048): length the stack is meant for. No tensor has this size;
            tools read it, and scaled rotary embeddings take it as their original length.
        position_encoding (`str`, defaults to `"transformer_xl"`): `"transformer_xl"` (the four terms of
            https://huggingface.co/papers/1901.02860, section 3.3) or `"rotary"`, whose attention is faster, but whose
            loss was higher after equal steps and equal time.
        rope_parameters (`dict`, *optional*): parameters of the rotary embedding, as everywhere in transformers.
        rope_dtype (`str`, defaults to `"float64"`): type in which angles are computed. `"float32"` is the convention
            of transformers, and of models converted from it: frequencies in float32, angles in the wider of float32
            and the model's type.
        rope_local_base_freq (`float`, *optional*): base of the plain rotary embedding of local layers, which replaces
            `rope_parameters` there (Gemma 3).
        local_rope_layers (`list[int]`, *optional*): 1 for each local layer, else 0.
        no_rope_layers (`list[int]`, *optional*): 1 for each layer that encodes positions, 0 for one that does not
            (SmolLM3).
        attention_bias (`bool`, defaults to `False`): whether all four projections of the attention have biases
            (Llama).
        qkv_bias (`bool`, defaults to `False`): whether those of queries, keys and values have biases (Qwen2).
        mlp_bias (`bool`, defaults to `False`): whether the projections of the feed-forward network have biases.
        qk_norm (`str`, *optional*): RMS norm of queries and keys before their positions: `"head"` normalises each
            head (Qwen3, Gemma 3), `"projection"` all heads together (OLMo 2).
        norm_placement (`str`, defaults to `"pre"`): RMS norms before attention and feed-forward network (`"pre"`),
            after them (`"post"`, OLMo 2) or both (`"both"`, Gemma 3).
        rms_norm_offset (`float`, defaults to 0.0): constant added to the weights of the RMS norms; 1.0 in Gemma 3.
        embedding_multiplier (`float`, *optional*): factor of the embeddings; defaults to `embedding_size ** 0.5`.
        attention_multiplier (`float`, *optional*): factor of the attention's dot products; defaults to
            `head_dim ** -0.5`.
        residual_multiplier (`float`, defaults to 1.0): factor of each branch's output (Granite).
        rms_norm_eps (`float`, defaults to 1e-6): epsilon of the RMS norms.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        dropout_rate (`float`, defaults to 0.0): dropout of the embeddings and of each residual branch.
        use_cache (`bool`, defaults to `True`): whether the decoder returns its cache.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): special tokens.

    Raises:
        ValueError: for an invalid value; the message names the value, the limit and the fix.
    """

    base_model_pp_plan = _PP_PLAN
    keys_to_ignore_at_inference = [CACHE, "memory"]

    vocab_size: int = 16000
    hidden_size: int = 384
    embedding_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    position_encoding: str = "transformer_xl"
    rope_parameters: RopeParameters | dict | None = None
    rope_dtype: str = "float64"
    rope_local_base_freq: int | float | None = None
    local_rope_layers: list[int] | None = None
    no_rope_layers: list[int] | None = None
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    norm_placement: str = "pre"
    rms_norm_eps: float = 1e-6
    rms_norm_offset: int | float = 0.0
    embedding_multiplier: int | float | None = None
    attention_multiplier: int | float | None = None
    residual_multiplier: int | float = 1.0
    initializer_range: float = 0.02
    dropout_rate: int | float = 0.0
    use_cache: bool = True
    is_decoder: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        heads = self.num_attention_heads
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 4 // 3 // 16) * 16
        if self.num_key_value_heads is None:
            self.num_key_value_heads = next((heads // g for g in (2, 3) if heads % g == 0), heads)
        if self.head_dim is None:
            if heads < 1 or self.hidden_size % heads:
                raise ValueError(
                    f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` ({heads}); "
                    "change one of them or give `head_dim`."
                )
            self.head_dim = self.hidden_size // heads
        super().__post_init__(**kwargs)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """How tensor parallelism cuts the modules that this config builds."""
        plan = _TP_PLAN if self.position_encoding == "rotary" else _TP_PLAN | _TP_PLAN_XL
        return plan | {"head": _TP_PLAN_HEAD_NORM, "projection": _TP_PLAN_PROJECTION_NORM}.get(self.qk_norm or "", {})

    @property
    def key_dim(self) -> int:
        """Dimensions of a key head: the position of `transformer_xl` takes as many again as the content."""
        return (self.head_dim or 0) * (1 if self.position_encoding == "rotary" else 2)

    @property
    def rope_kinds(self) -> list[str | None]:
        """The rotary embedding of each layer: `None` for that of `rope_parameters`, `"local"`, or `"none"`."""
        rotated = self.no_rope_layers or [1] * self.num_hidden_layers
        local = self.local_rope_layers or [0] * self.num_hidden_layers
        return [("local" if own else None) if rotates else "none" for rotates, own in zip(rotated, local)]

    def validate_architecture(self):
        """Refuse sizes that cannot work. Part of the validation that `@strict` runs."""
        for name in (
            "vocab_size",
            "hidden_size",
            "embedding_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but it must be at least 1; raise it.")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"`num_attention_heads` ({heads}) must be a multiple of `num_key_value_heads` ({groups}); choose "
                f"`num_key_value_heads` among the divisors of {heads}."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but it must be one of {choices}; choose one of them."
                )
        for name in ("local_rope_layers", "no_rope_layers"):
            value = getattr(self, name)
            if value is not None and len(value) < self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` has {len(value)} entries, but there are {self.num_hidden_layers} layers; give one for "
                    "each."
                )
        if self.local_rope_layers is not None and self.rope_local_base_freq is None:
            raise ValueError("`local_rope_layers` is given, but `rope_local_base_freq` is not; give both or neither.")
        if self.head_dim % 2:
            raise ValueError(
                f"`head_dim` is {self.head_dim}, but position encodings need an even head size; choose "
                "`hidden_size`, `num_attention_heads` or `head_dim` so that it is even."
            )
        if self.embedding_size > self.hidden_size:
            raise ValueError(
                f"`embedding_size` ({self.embedding_size}) must not exceed `hidden_size` ({self.hidden_size}); "
                "lower it, or leave it out for an unfactorised table."
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"`dropout_rate` is {self.dropout_rate}, but it must be in [0, 1); lower it.")


@strict
class FlashLiteEncoderConfig(FlashLiteStackConfig):
    """Configuration of the dense bidirectional encoder; the fields are those of [`FlashLiteStackConfig`]."""

    model_type = "flashlite_encoder"


@strict
class FlashLiteDecoderConfig(FlashLiteStackConfig):
    r"""Configuration of the sparse decoder: the fields of [`FlashLiteStackConfig`] and the three axes.

    Args:
        block_size (`int`, defaults to 64): tokens in a block (b).
        sub_block_size (`int`, *optional*): tokens per mean key for block selection (c); defaults to 16, or to
            `block_size` if 16 does not divide it. Smaller ones select better and cost more.
        relevance_top_k (`int`, *optional*, defaults to 8): past blocks that a token reads in full (K), in addition to
            its own, the previous and the first block; `None` reads all of them, which is dense attention.
        memory_blocks (`int`, *optional*, defaults to 512): past blocks that a token can reach at all (W), apart from
            the first one; this bounds the segment memory and the cache. `None` keeps everything. Once the first block
            has left this window, it is positioned just before it, so that no distance exceeds `(memory_blocks + 2) *
            block_size`.
        logits_scaling (`float`, defaults to 1.0): divisor of the logits of the language-model head (Granite).
    """

    model_type = "flashlite_decoder"

    is_decoder: bool = True
    block_size: int = 64
    sub_block_size: int | None = None
    relevance_top_k: int | None = 8
    memory_blocks: int | None = 512
    logits_scaling: int | float = 1.0

    def __post_init__(self, **kwargs):
        if self.sub_block_size is None:
            self.sub_block_size = self.block_size if self.block_size % 16 else min(16, max(1, self.block_size))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse sizes that cannot work. Part of the validation that `@strict` runs."""
        super().validate_architecture()
        for name, least in (("block_size", 1), ("sub_block_size", 1), ("relevance_top_k", 0), ("memory_blocks", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` is {value}, but it must be at least {least}; raise it.")
        if self.block_size % self.sub_block_size:
            raise ValueError(
                f"`block_size` ({self.block_size}) must be a multiple of `sub_block_size` ({self.sub_block_size}); "
                f"choose `sub_block_size` among the divisors of {self.block_size}."
            )


def _field_names(config_class) -> set[str]:
    return set(config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__) - {"is_decoder"}


_DECODER_FIELDS = _field_names(FlashLiteDecoderConfig)
_ENCODER_FIELDS = _field_names(FlashLiteEncoderConfig)


@strict
class FlashLiteConfig(PreTrainedConfig):
    r"""Configuration of a Flash-Lite model.

    Fields of the stacks may be given flat: they then hold for both stacks, and `encoder=` and `decoder=` override them
    one by one. Reading such a field (`config.hidden_size`) gives the decoder's value; assigning it sets both stacks.

    Args:
        encoder ([`FlashLiteEncoderConfig`] or `dict`, *optional*): the encoder; `None` in a decoder-only model.
        decoder ([`FlashLiteDecoderConfig`] or `dict`, *optional*): the decoder.
        is_encoder_decoder (`bool`, defaults to `True`): whether there is an encoder.
        tie_word_embeddings (`bool`, defaults to `True`): one table for encoder, decoder and language-model head.
        decoder_start_token_id (`int`, *optional*): first token of the decoder; defaults to `bos_token_id`, and to
            `pad_token_id` where there is none.
        classifier_dropout_rate (`float`, defaults to 0.0): dropout before the classification heads.

    Example:

    ```python
    >>> from modeling_flashlite import FlashLiteConfig
    >>> config = FlashLiteConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=8000)
    >>> config.encoder.hidden_size, config.decoder.block_size
    (256, 64)
    ```
    """

    model_type = "flashlite"
    base_model_fsdp_plan = {}  # type: ignore[var-annotated]  # the stacks have their own
    keys_to_ignore_at_inference = [CACHE, "memory"]
    sub_configs = {"encoder": FlashLiteEncoderConfig, "decoder": FlashLiteDecoderConfig}  # type: ignore[assignment]
    sub_configs_defaults = sub_config_specs(sub_configs, optional="encoder")

    encoder: FlashLiteEncoderConfig | dict[Any, Any] | None = None
    decoder: FlashLiteDecoderConfig | dict[Any, Any] | None = None
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = None
    classifier_dropout_rate: int | float = 0.0

    def __post_init__(self, **kwargs):
        rope = {name: kwargs.pop(name) for name in ("rope_theta", "rope_scaling") if name in kwargs}
        flat = {name: kwargs.pop(name) for name in _DECODER_FIELDS & set(kwargs)}
        flat.update(rope)
        # `use_cache` and the like are base fields of no stack, so only the stacks' own fields fan out
        if not isinstance(self.decoder, PreTrainedConfig):
            self.decoder = FlashLiteDecoderConfig(**{**flat, **(self.decoder or {})})
        if not self.is_encoder_decoder:
            self.encoder = None
        elif not isinstance(self.encoder, PreTrainedConfig):
            shared = {name: value for name, value in flat.items() if name in _ENCODER_FIELDS or name in rope}
            self.encoder = FlashLiteEncoderConfig(**{**shared, **(self.encoder or {})})
        if self.decoder_start_token_id is None and self.is_encoder_decoder:
            bos, pad = self.decoder.bos_token_id, self.decoder.pad_token_id
            self.decoder_start_token_id = bos if bos is not None else pad
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested dictionaries."""
        register_lora_targets()  # peft calls this before it looks up which layers to adapt
        return super().to_dict()

    def __getattr__(self, name):
        # called only if normal lookup fails: fields of the stacks read as the decoder's
        if name in _DECODER_FIELDS and isinstance(self.__dict__.get("decoder"), PreTrainedConfig):
            return getattr(self.decoder, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name, value):
        if name not in _DECODER_FIELDS or not isinstance(self.__dict__.get("decoder"), PreTrainedConfig):
            return super().__setattr__(name, value)
        setattr(self.decoder, name, value)
        if self.encoder is not None and name in _ENCODER_FIELDS:
            setattr(self.encoder, name, value)

    def validate_architecture(self):
        """Refuse stacks that do not fit together. Part of the validation that `@strict` runs."""
        if self.encoder is None:
            return
        for name in ("vocab_size", "embedding_size", "hidden_size"):
            ours, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
            if ours != theirs:
                raise ValueError(
                    f"`{name}` is {ours} in the encoder and {theirs} in the decoder, but both stacks share one "
                    f"embedding table and one key space; give them the same `{name}`."
                )


def _show_flat_fields(init) -> None:
    """Add the flat fields to the signature, for `help` and for tools that ask what a config takes."""
    signature, fields = inspect.signature(init), FlashLiteDecoderConfig.__dataclass_fields__
    keyword = inspect.Parameter.KEYWORD_ONLY
    flat = [inspect.Parameter(name, keyword, default=fields[name].default) for name in sorted(_DECODER_FIELDS)]
    init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *flat])


_show_flat_fields(FlashLiteConfig.__init__)

__all__ = ["FlashLiteConfig", "FlashLiteDecoderConfig", "FlashLiteEncoderConfig"]
