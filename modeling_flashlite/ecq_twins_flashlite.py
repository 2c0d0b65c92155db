"""Fake-quantized twins of layers for quantization-aware training: float weights, rounded to learned steps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from .ecq_modules_flashlite import HELD, TWIN_STATE, EcqModule, _Layer, retype
from .ecq_weight_flashlite import QuantizedWeight

_PIECE = 1 << 17  # weights rounded at once: they and what is made of them stay in a core's cache


def pieces(weight: torch.Tensor, start: torch.Tensor, scale: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows of a weight `[rows, columns]` at a time, with their steps `start[row] * scale[column]`."""
    size = max(1, _PIECE // max(1, weight.shape[1]))
    for row in range(0, len(weight), size):
        rows = slice(row, row + size)
        yield rows, start[rows, None] * scale


class _FakeQuantize(torch.autograd.Function):
    """Learned step size quantization (LSQ, Esser et al. 2020), step `s = exp2(shift) * start[row] * scale[column]`.

    Forward: `s * clamp(round(w / s), -128, 127)`, in `dtype`. Backward: the gradient passes to w where `w / s` is
    inside, and `dL/dshift = ln 2 * sum g * s * (q - u inside, q outside)`, scaled by `1 / sqrt(7 * elements)`.
    """

    @staticmethod
    def forward(ctx, weight, shift, start, scale, elements=None, dtype=None):
        start = torch.exp2(shift.float()) * start
        ctx.save_for_backward(weight, start, scale)
        ctx.elements = elements or weight.numel()
        rounded = torch.empty_like(weight, dtype=dtype or weight.dtype)
        for rows, step in pieces(weight, start, scale):
            rounded[rows] = (weight[rows].float() / step).round_().clamp_(*LEVELS).mul_(step)
        return rounded

    @staticmethod
    def backward(ctx, grad):
        weight, start, scale = ctx.saved_tensors
        inner, grad_shift = torch.empty_like(weight), grad.new_zeros((), dtype=torch.float32)
        for rows, step in pieces(weight, start, scale):
            piece, passed = weight[rows].float(), grad[rows].float()
            rounded = (piece / step).round_().clamp_(*LEVELS).mul_(step)
            slope = rounded - piece
            # more than half a step only where codes are clamped; the margin covers rounding
            outside = slope.abs() > 0.501 * step
            grad_shift += (passed * torch.where(outside, rounded, slope)).sum()
            inner[rows] = passed.masked_fill(outside, 0.0)
        grad_shift *= math.log(2) / math.sqrt(7 * ctx.elements)
        return inner, grad_shift.reshape(1), None, None, None, None


LEVELS = -128, 127  # codes in training


class FakeQuantModule(_Layer):
    """Base of the twins: a float weight, a learned step for the tensor, frozen relative steps of its rows.

    Attributes:
        log_step (parameter `[1]`): learned shift of log2 of all steps; it starts at 0, so weight decay does no harm.
        log_base (buffer `[1]`), exponents (buffer int8 `[rows]`):
            `step[row] = 2 ** (log_base + log_step + exponents[row] / grid)`.
        column_exponents (buffer int8 `[columns]`): steps of a column are `2 ** (column_exponents / grid)` times that.
        code_lengths (buffer `[256]`): running mean of `-log2` of the frequency of each code of `LEVELS`.
    """

    def _open_twin(self, weight: QuantizedWeight, master: torch.Tensor) -> None:
        device = self.weight.device
        self._parameters["weight"] = nn.Parameter(master, requires_grad=self.weight.requires_grad)
        self._parameters["log_step"] = nn.Parameter(torch.zeros(1, device=device))
        self.register_buffer("log_base", torch.tensor([math.log2(weight.base)], device=device))
        self.register_buffer("exponents", weight.exponents.to(device, torch.int8))
        columns = weight.column_exponents
        columns = torch.zeros(master.shape[1], dtype=torch.int8) if columns is None else columns
        self.register_buffer("column_exponents", columns.to(device, torch.int8))
        self.register_buffer("code_lengths", torch.full((LEVELS[1] - LEVELS[0] + 1,), 4.0, device=device))
        self.grid = weight.grid

    def share_twin(self, other: FakeQuantModule) -> None:
        """Use weight and steps of a tied twin."""
        for name in ("weight", "log_step"):
            self._parameters[name] = other._parameters[name]
        for name in TWIN_STATE:
            self.register_buffer(name, other._buffers[name])
        self.grid = other.grid

    def _start(self) -> torch.Tensor:
        return torch.exp2(self.log_base.double() + self.exponents.double() / self.grid).float()

    def _scale(self) -> torch.Tensor:
        return torch.exp2(self.column_exponents.double() / self.grid).float()

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Some rows at a time: their place, and float32 weights and steps `[rows, columns]` without gradient."""
        start = torch.exp2(self.log_step.detach().float()) * self._start()
        weight = self.weight.detach()
        for rows, step in pieces(weight, start, self._scale()):
            yield rows, weight[rows].float(), step

    def codes(self) -> torch.Tensor:
        """Codes of the current weight, int8 `[rows, columns]`."""
        codes = torch.empty(self.weight.shape, dtype=torch.int8, device=self.weight.device)
        for rows, weight, step in self.pieces():
            codes[rows] = (weight / step).round_().clamp_(*LEVELS).to(torch.int8)
        return codes

    def fake_quantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight rounded to its levels, `[rows, columns]`, differentiable; in its own or another dtype."""
        return _FakeQuantize.apply(self.weight, self.log_step, self._start(), self._scale(), None, dtype)

    def quantized(self) -> QuantizedWeight:
        """The quantized weight that will be written to the file."""
        base = torch.exp2(self.log_base.double() + self.log_step.detach().double()).float().item()
        columns = self.column_exponents if self.column_exponents.any() else None
        return QuantizedWeight(self.codes(), base, self.exponents, self.grid, columns)


class FakeQuantLinear(FakeQuantModule, nn.Linear):
    """`nn.Linear` that multiplies with its weight rounded to its steps; the weight stays float and trainable."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        return nn.functional.linear(input, self.fake_quantized(dtype), self.bias)


class FakeQuantEmbedding(FakeQuantModule, nn.Embedding):
    """`nn.Embedding` that looks up its weight rounded to its steps; the weight stays float and trainable."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # only the rows that are read are rounded
        rows = nn.functional.embedding(input.flatten(), self.weight, self.padding_idx)
        start, elements = self._start()[input.flatten()], self.weight.numel()
        rows = _FakeQuantize.apply(rows, self.log_step, start, self._scale(), elements)
        return rows.view(*input.shape, -1)


def to_twin(module: nn.Module, weight: QuantizedWeight, master: torch.Tensor) -> nn.Module:
    """Turn a layer into its fake-quantized twin with the float weight `master` `[rows, columns]`."""
    if isinstance(module, EcqModule):
        module._forget()
        for name in HELD[1:]:
            module._parameters.pop(name, None)
    module = retype(module, FakeQuantLinear, FakeQuantEmbedding)
    module._open_twin(weight, master)
    return module
