"""Small random models of two layers in float64, random tokens for them, and decoding token by token."""

import contextlib

import torch

from modeling_flashlite import (
    FlashLiteConfig,
    FlashLiteForCausalLM,
    FlashLiteForConditionalGeneration,
)
from modeling_flashlite.decode_flashlite import decode_session


def randomized(model, dtype=torch.float64):
    """Weights large enough that attention is far from uniform."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def causal_model(seed=0, dtype=torch.float64, **overrides):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "block_size": 4,
        "sub_block_size": 2,
        "relevance_top_k": 1,
        "memory_blocks": 5,
        "is_encoder_decoder": False,
    }
    config = FlashLiteConfig(**{**sizes, **overrides})
    cls = FlashLiteForConditionalGeneration if config.is_encoder_decoder else FlashLiteForCausalLM
    return randomized(cls(config), dtype)


def tokens(rows, columns, seed=1):
    return torch.randint(3, 61, (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def one_by_one(model, ids, past=None, session=True, **inputs):
    """Logits `[B, T, V]` of tokens that come one at a time, and the cache."""
    name, logits = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids", []
    with decode_session(model) if session else contextlib.nullcontext():
        for token in ids.split(1, dim=1):
            out = model(**{name: token}, past_key_values=past, use_cache=True, **inputs)
            past = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, dim=1), past
