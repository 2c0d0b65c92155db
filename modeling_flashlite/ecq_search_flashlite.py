"""Steps and codes: rounding with error feedback, and the search for the multiplier that meets a byte budget.

Quantizing `W [rows, columns]` to `W + E` costs about `1/2 tr(E^T G E H)`, with `G = E[g g^T]` of the gradients of
the output and `H = E[x x^T]` of the inputs. With upper Cholesky factors `C_G`, `C_H` of the damped inverses, rounding
the elements in order and subtracting `(w - q) / (C_G[i,i] C_H[j,j]) * C_G[i, i':] C_H[j, j':]` from those not yet
rounded is optimal for that order. `C_H` alone is GPTQ (Frantar et al. 2022); both are used where that is affordable.

At rates above about 1.5 bits the best steps are proportional to `C_G[i,i]` and to the geometric mean of `C_H[j,j]`,
which equalises what one more bit buys everywhere; one multiplier then sets the rate (reverse water-filling).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import nn

from .ecq_stream_flashlite import CODE_RANGE, QuantizedWeight, stream_bytes, wide_columns

logger = logging.getLogger(__name__)
_MIN_STEP, _MAX_STEP = 0.28, 3.0  # in standard deviations of the row: the useful range for 16 levels
_WAVE_ROWS = 64


def grid_of(columns: int) -> int:
    """Step sizes per octave: the fewer columns share a step, the coarser."""
    return 8 if columns < 256 else 16


@dataclass
class Layer:
    """A weight to be quantized.

    Attributes:
        names (`list[str]`): its modules, more than one if it is tied.
        modules (`list[nn.Module]`): the same.
        weight (`torch.Tensor` float `[rows, columns]`): the original.
        log_steps (`torch.Tensor` `[rows]`): log2 of the wanted steps, up to the common multiplier.
        input_factor, output_factor (`torch.Tensor`, *optional*): `C_H` and `C_G` of the module's docstring, float64.
        input_moment (`torch.Tensor`, *optional*): H.
    """

    names: list[str]
    modules: list[nn.Module]
    weight: torch.Tensor
    log_steps: torch.Tensor
    input_factor: torch.Tensor | None = None
    output_factor: torch.Tensor | None = None
    input_moment: torch.Tensor | None = None
    sigma: torch.Tensor = field(init=False)

    def __post_init__(self):
        sigma = self.weight.float().square().mean(1).sqrt()
        self.sigma = sigma.clamp(min=max(1e-3 * sigma.mean().item(), 1e-12))

    @property
    def grid(self) -> int:
        return grid_of(self.weight.shape[1])

    def steps(self, multiplier: float) -> tuple[float, torch.Tensor]:
        """(base, exponents int8 `[rows]`) for the log2 of the common multiplier."""
        low, high = torch.log2(self.sigma * _MIN_STEP), torch.log2(self.sigma * _MAX_STEP)
        wanted = (self.log_steps.float() + multiplier).clamp(low, high)
        centre = wanted.median()
        base = torch.exp2(centre).float().item()
        exponents = torch.round((wanted - centre) * self.grid).clamp(-127, 127).to(torch.int8)
        return base, exponents


def inverse_factor(moment: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of a damped second moment `[n, n]`, float64."""
    moment = moment.double()
    mean = moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    moment = moment + damping * mean * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)


def _round_columns(weight, step, low, high, factor):
    """GPTQ: all rows at once, column after column, in blocks of 128."""
    codes, columns = torch.empty_like(weight), weight.shape[1]
    for first in range(0, columns, 128):
        last = min(first + 128, columns)
        errors = torch.empty_like(weight[:, first:last])
        for j in range(first, last):
            codes[:, j] = torch.round(weight[:, j] / step).clamp(low[j], high[j])
            error = (weight[:, j] - codes[:, j] * step) / factor[j, j]
            weight[:, j:last] -= error[:, None] * factor[j, j:last]
            errors[:, j - first] = error
        weight[:, last:] -= errors @ factor[first:last, last:]
    return codes


def _round_waves(weight, step, low, high, factor, rows_factor):
    """Feedback along rows and columns: antidiagonals of blocks of rows, whose elements do not depend on each other."""
    codes, (rows, columns) = torch.empty_like(weight), weight.shape
    diagonal, rows_diagonal = factor.diagonal(), rows_factor.diagonal()
    for first in range(0, rows, _WAVE_ROWS):
        last = min(first + _WAVE_ROWS, rows)
        errors = torch.zeros_like(weight[first:last])
        for wave in range(last - first + columns - 1):
            i = torch.arange(max(0, wave - columns + 1), min(last - first, wave + 1), device=weight.device)
            j, at = wave - i, i + first
            value = weight[at, j]
            code = torch.round(value / step[at]).clamp(low[j], high[j])
            error = (value - code * step[at]) / (rows_diagonal[at] * diagonal[j])
            codes[at, j], errors[i, j] = code, error
            left = j[-1]
            update = rows_factor[at, at[0] : last].T @ (error[:, None] * factor[j, left:])
            weight[at[0] : last, left:] -= update
        weight[last:] -= rows_factor[first:last, last:].T @ (errors @ factor)
    return codes


def quantize_layer(layer: Layer, multiplier: float, feedback: bool = True) -> QuantizedWeight:
    """Round one weight at the steps of `multiplier` (log2); `feedback=False` is round-to-nearest."""
    base, exponents = layer.steps(multiplier)
    weight = layer.weight.double()
    step = base * torch.exp2(exponents.double() / layer.grid)
    wide = wide_columns(weight / step[:, None])
    low, high = (torch.where(wide, float(far), near).to(weight) for far, near in zip(CODE_RANGE, (-8.0, 7.0)))
    if not feedback or layer.input_factor is None:
        codes = torch.round(weight / step[:, None]).clamp(low, high)
    elif layer.output_factor is None:
        codes = _round_columns(weight.clone(), step, low, high, layer.input_factor)
    else:
        codes = _round_waves(weight.clone(), step, low, high, layer.input_factor, layer.output_factor)
    base *= _gain(layer, weight, codes * step[:, None])
    codes = codes.to(torch.int16 if wide.any() else torch.int8)
    return QuantizedWeight(codes, torch.tensor(base).item(), exponents, layer.grid)


def _gain(layer: Layer, weight: torch.Tensor, rounded: torch.Tensor) -> float:
    """Least-squares factor of the whole tensor: `<W, Q H> / <Q, Q H>`."""
    product = rounded if layer.input_moment is None else rounded @ layer.input_moment.double()
    power = (rounded * product).sum().item()
    gain = (weight * product).sum().item() / power if power > 0 else 1.0
    return gain if 0.5 < gain < 2 else 1.0


def search(
    layers: list[Layer], budget: float | None, overhead: float, multiplier: float = -1.0, tolerance: float = 0.006
) -> list[QuantizedWeight]:
    """Codes of all layers at the multiplier whose file meets the budget.

    The rate falls by one bit per octave of the multiplier. Rounding to nearest, which is cheap, finds the place;
    feedback passes correct it until the file is at most the budget and within the tolerance.

    Args:
        layers (`list[Layer]`): the weights.
        budget (`float`, *optional*): bytes of the file; `None` keeps `multiplier`.
        overhead (`float`): bytes of the file that are not these streams.
        multiplier (`float`): log2 of the first multiplier to try.
        tolerance (`float`): how far below the budget is near enough, as a share of it.
    """
    if budget is None:
        return [quantize_layer(layer, multiplier) for layer in layers]
    room = budget - overhead
    elements = sum(layer.weight.numel() for layer in layers)
    if room < elements / 16:
        raise ValueError(
            f"A budget of {budget:.0f} bytes leaves {max(room, 0):.0f} for {elements} weights besides {overhead:.0f}"
            " bytes of other tensors and headers; ask for at least half a bit per weight more than those take."
        )

    def size(shift: float, feedback: bool) -> tuple[list[QuantizedWeight], int]:
        weights = [quantize_layer(layer, shift, feedback) for layer in layers]
        return weights, sum(stream_bytes(weight) for weight in weights)

    feedback = any(layer.input_factor is not None for layer in layers)
    for _ in range(12 if feedback else 0):
        _, held = size(multiplier, False)
        if abs(held / room - 1) < tolerance:
            break
        multiplier += 8 * (held - room) / elements
    best = too_large = last = None
    slope = elements / 8  # bytes that one octave saves; feedback makes it smaller
    for attempt in range(12):
        weights, held = size(multiplier, feedback)
        if last is not None and last[0] != multiplier:
            slope = min(max((held - last[1]) / (last[0] - multiplier), elements / 80), elements / 8)
        last = multiplier, held
        if held > room:
            too_large = multiplier, held
        elif best is None or held > best[1]:
            best = weights, held, multiplier
        if best is not None and (best[1] >= (1 - tolerance) * room or attempt > 7):
            break
        if best is not None and too_large is not None:
            share = ((1 - tolerance / 2) * room - best[1]) / (too_large[1] - best[1])
            multiplier = best[2] + min(max(share, 0.1), 0.9) * (too_large[0] - best[2])
        else:
            multiplier += (held - (1 - tolerance * (0.5 + 0.25 * attempt)) * room) / slope
    if best is None and feedback:
        # Where few directions of the input carry all the power, fed-back errors cost more bits than longer steps save.
        logger.warning(
            "Rounding with error feedback needs at least %.2f bits per weight here and the budget is %.2f; all weights"
            " are rounded to nearest instead, without calibration: ask for more bits, or train with qat.prepare_qat.",
            8 * (last[1] + overhead) / elements,
            8 * budget / elements,
        )
        for layer in layers:
            layer.input_factor = layer.output_factor = None
        return search(layers, budget, overhead, tolerance=tolerance)
    if best is None:
        raise ValueError(
            f"{8 * budget / elements:.2f} bits per weight are out of reach: steps of {_MAX_STEP} standard deviations"
            f" still need {held + overhead:.0f} bytes; ask for more bits."
        )
    if best[1] < 0.97 * room:
        logger.warning(
            "The file has %.2f bits per weight of a budget of %.2f: 16 levels have no use for more.",
            8 * (best[1] + overhead) / elements,
            8 * budget / elements,
        )
    return best[0]
