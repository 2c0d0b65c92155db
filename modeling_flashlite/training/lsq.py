"""Learned step size quantization (LSQ), the published baseline of the quantizer."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback

__all__ = ["PlainLSQ"]


class _Levels(nn.Module):
    """A weight `[N, K]` on `2 ** bits` levels, with a learned step per row."""

    def __init__(self, weight: torch.Tensor, bits: int):
        super().__init__()
        self.low, self.high = -(1 << bits - 1), (1 << bits - 1) - 1
        # the row of the padding token is all zeros
        mean = weight.detach().abs().mean(1, keepdim=True).clamp(min=1e-8)
        self.step = nn.Parameter(2 * mean / math.sqrt(self.high))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scale = 1 / math.sqrt(weight.shape[1] * self.high)
        step = self.step * scale + (self.step * (1 - scale)).detach()
        ratio = (weight / step).clamp(self.low, self.high)
        return (ratio + (ratio.round() - ratio).detach()) * step


class PlainLSQ(TrainerCallback):
    """Learned step size quantization as published (Esser et al., arXiv:1902.08153), for a fixed number of bits. The
    model trains on the quantized levels and keeps them as floats when training ends.

    Args:
        model (`nn.Module`): changed in place.
        layers (`Iterable[Sequence[nn.Module]]`): layers to quantize; those of one entry are tied.
        bits (`int`): of a code, at least 2.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Sequence[nn.Module]], bits: int):
        self.layers, self.bits = [list(modules) for modules in layers], bits
        for modules in self.layers:
            levels = _Levels(modules[0].weight, bits)
            for module in modules:
                parametrize.register_parametrization(module, "weight", levels)

    def bits_per_weight(self, model: nn.Module) -> float:
        """Bits per weight of a file with packed codes, and steps and all other tensors in 16 bits."""
        weights = [modules[0].weight for modules in self.layers]
        codes, rows = sum(weight.numel() for weight in weights), sum(len(weight) for weight in weights)
        total = sum(
            p.numel() for name, p in model.named_parameters() if not name.endswith("parametrizations.weight.0.step")
        )
        return (self.bits * codes + 16 * (rows + total - codes)) / total

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for modules in self.layers:
            for module in modules:
                parametrize.remove_parametrizations(module, "weight")
            for module in modules[1:]:
                module.weight = modules[0].weight
