# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""How closely a converted model follows its parent, and what its sparse attention costs in perplexity."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..modeling_flashlite import FlashLiteForCausalLM

__all__ = ["full_attention", "logit_parity", "perplexities", "perplexity"]


@contextlib.contextmanager
def products_in_float64(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside the context, the weights of one layer at a time are widened to float64, and with them the states."""

    def widen(module: torch.nn.Module, args: tuple) -> None:
        narrow[module] = dict(module._parameters)
        for name, weight in narrow[module].items():
            if weight is not None:
                setattr(module, name, torch.nn.Parameter(weight.double(), requires_grad=False))

    def restore(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        module._parameters.update(narrow.pop(module))

    narrow: dict[torch.nn.Module, dict] = {}
    leaves = [module for module in model.modules() if module._parameters and not module._modules]
    hooks = [module.register_forward_pre_hook(widen) for module in leaves]
    hooks += [module.register_forward_hook(restore) for module in leaves]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def logit_parity(model: PreTrainedModel, parent: PreTrainedModel, ids: torch.Tensor) -> dict[str, float]:
    """How far the logits of two models on ids `[1, T]` are apart, and how far float32 is from float64.

    Two exact copies differ by as much as their products round: [`Linear`] sums in another order than PyTorch. With
    PyTorch's products in both, the difference should be 0; against the parent's own logits from products in float64,
    both are off by as much as float32 allows.

    Returns:
        `dict` with the largest difference of the logits; the same with PyTorch's products in both; the largest
        difference of ours and of the parent's from the parent's in float64; the largest logit; and how often both
        choose the same token.
    """
    ours, theirs = (x(ids, use_cache=False).logits.float() for x in (model, parent))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the flags speak of graphics cards
        with torch.backends.mkldnn.flags(enabled=False):
            plain = model(ids, use_cache=False).logits.float()
    with products_in_float64(parent):
        exact = parent(ids, use_cache=False).logits
    return {
        "tokens": ids.shape[1],
        "largest_difference": float((ours - theirs).abs().max()),
        "with_plain_products": float((plain - theirs).abs().max()),
        "from_float64": float((ours - exact).abs().max()),
        "parent_from_float64": float((theirs - exact).abs().max()),
        "largest_logit": float(theirs.abs().max()),
        "same_choice": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }


@torch.inference_mode()
def perplexities(model: FlashLiteForCausalLM, ids: torch.Tensor) -> dict[str, float]:
    """Perplexity of `ids[0, 1:]`, read in one pass: with full attention, and as the model is."""
    with full_attention(model):
        dense = perplexity(model, ids)
    return {"tokens": ids.shape[1], "dense": dense, "sparse": perplexity(model, ids)}


@torch.inference_mode()
def perplexity(model: FlashLiteForCausalLM, ids: torch.Tensor) -> float:
    """Perplexity of `ids[0, 1:]`, each token read after all before it, in one pass."""
    states, total = model.model(ids, use_cache=False).last_hidden_state[0, :-1], 0.0
    for part, targets in zip(states.split(256), ids[0, 1:].split(256)):  # logits of few tokens at a time
        logits = model.lm_head(part / model.get_decoder().config.logits_scaling)
        total += float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
    return math.exp(total / (ids.shape[1] - 1))


@contextlib.contextmanager
def full_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside the context, every token of the model reads all before it."""
    attentions = [layer.self_attn for layer in model.get_decoder().layers]
    specs = [attention.spec for attention in attentions]
    for attention in attentions:
        attention.spec = dataclasses.replace(attention.spec, relevance_top_k=None, memory_blocks=None)
    try:
        yield model
    finally:
        for attention, spec in zip(attentions, specs):
            attention.spec = spec
