"""Steps and codes: rounding with error feedback, and the search for the step multiplier that meets a byte budget.

A weight is `W[r, c] ~ step[r] * scale[c] * code[r, c]` with integer codes of any size, entropy-coded. An error `E` of
`W` raises the loss by about `1/2 sum_r g_r E_r H E_r^T`, with `H = E[x x^T]` of the inputs and `g_r` the second
moment of the gradient of output r. With `U` the upper Cholesky factor of the damped `H^-1`, rounding column after
column and subtracting `(w_c - q_c) / U[c, c] * U[c, c':]` from those not yet rounded is optimal for that order (GPTQ,
Frantar et al. 2022), and leaves `sum_c (error of c)^2 / U[c, c]^2`.

At rates above about 1.5 bits, the marginal benefit of a bit is equal everywhere when `step[r] * scale[c]` is
proportional to `U[c, c] / sqrt(g_r)` (reverse water-filling; WaterSIC, 2026, for the columns). One multiplier of all
steps then sets the rate. Because moments are noisy, steps follow them only partly, and otherwise the standard
deviation of each row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from .ecq_stream_flashlite import stream_bytes
from .ecq_weight_flashlite import CODE_RANGE, QuantizedWeight, wide_columns

logger = logging.getLogger(__name__)
GRID = 8  # step sizes per octave
_MIN_STEP, _MAX_STEP = 0.004, 3.0  # in standard deviations of the row
_MOST_STEPS = 0.9 * CODE_RANGE[1]  # in the largest weight of a row; feedback needs the rest
_SCALE_SHARE = 0.8  # exponent with which column scales follow diag(U)
_MAX_SCALE = 1.0  # limit in octaves: a column whose step exceeds its weights saves no more bits
_SCALE_ROWS = 128  # rows of the largest weight that reads an input, below which column scales did harm
_TABLE_STEP = -1.0  # log2 of an embedding table's steps relative to other layers, without data
_BLOCK = 64  # columns between two updates of the remaining ones
_ROWS = 8192  # rows at a time, so that a block of their columns stays in the cache
_SAMPLE = 1 << 18  # sampled weights for the prediction of a rate
_CLASSES = 8  # classes of columns, which the stream codes separately
_CODER = 1.012  # overhead of the coder relative to the entropy


@dataclass
class Layer:
    """A weight to be quantized.

    Attributes:
        names (`list[str]`): its modules, more than one if it is tied.
        modules (`list[nn.Module]`): the same.
        weight (`torch.Tensor` float `[rows, columns]`): the original.
        log_steps (`torch.Tensor` float `[rows]`): log2 of the relative steps, without the common multiplier.
        log_scales (`torch.Tensor` float `[columns]`, *optional*): log2 of the column scales, with a mean of 0.
        input_factor (`torch.Tensor` `[columns, columns]`, *optional*): `U` of the module's docstring.
        input_moment (`torch.Tensor` `[columns, columns]`, *optional*): H.
        price (`torch.Tensor` `[rows]`, *optional*): nats that rounding a row costs, over its squared step.
        noise (`torch.Tensor` `[columns]`, *optional*): variance that feedback adds to a weight over its row's step.
    """

    names: list[str]
    modules: list[nn.Module]
    weight: torch.Tensor
    log_steps: torch.Tensor
    log_scales: torch.Tensor | None = None
    input_factor: torch.Tensor | None = None
    input_moment: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    price: torch.Tensor | None = None
    sigma: torch.Tensor = field(init=False)
    _peak: tuple[torch.Tensor | None, torch.Tensor] | None = field(init=False, default=None)

    def __post_init__(self):
        sigma = torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float32) / self.weight.shape[1] ** 0.5
        self.sigma = sigma.clamp(min=max(1e-3 * sigma.mean().item(), 1e-12))

    @property
    def is_table(self) -> bool:
        return any(isinstance(module, nn.Embedding) for module in self.modules)

    def steps(self, multiplier: float) -> tuple[float, torch.Tensor]:
        """(base, exponents int8 `[rows]`) for the log2 of the common multiplier."""
        low = torch.log2(torch.maximum(self.sigma * _MIN_STEP, self.peak() / _MOST_STEPS))
        high = torch.maximum(torch.log2(self.sigma * _MAX_STEP), low)
        wanted = (self.log_steps.float() + multiplier).clamp(low, high)
        centre = wanted.median()
        base = torch.exp2(centre).float().item()
        exponents = torch.round((wanted - centre) * GRID).clamp(-127, 127).to(torch.int8)
        return base, exponents

    def peak(self) -> torch.Tensor:
        """Largest magnitude `[rows]` of the weights over their column scales, which no code may fail to reach."""
        if self._peak is None or self._peak[0] is not self.log_scales:
            scale, exponents = self.sigma.new_ones(()), self.column_exponents()
            if exponents is not None:
                scale = torch.exp2(exponents.to(self.sigma.device).float() / GRID)
            parts = [(rows.float().abs() / scale).amax(1) for rows in self.weight.split(_ROWS)]
            self._peak = self.log_scales, torch.cat(parts)
        return self._peak[1]

    def follow(self, moment: torch.Tensor, rows: int | None = None) -> float:
        """Set feedback and column scales from the second moment of the inputs; returns the mean log2 of diag(U).

        Args:
            moment (`torch.Tensor` `[columns, columns]`): H.
            rows (`int`, *optional*): of the largest weight that reads this input; all of them need the same scales to
                be multiplied together. This weight's own if unset.
        """
        factor = inverse_factor(moment)
        spread = factor.diagonal().log2()
        scales = (_SCALE_SHARE * (spread - spread.mean())).clamp(-_MAX_SCALE, _MAX_SCALE)
        scales -= scales.mean()
        worth = (rows or len(self.weight)) >= _SCALE_ROWS
        self.log_scales = scales.float() if worth else torch.zeros_like(scales, dtype=torch.float32)
        scale = self._column_scales().double()
        self.noise = ((scale / factor.diagonal())[:, None] * factor.triu(1)).square().sum(0).float() / 12
        self.input_factor, self.input_moment = factor.float(), moment
        return spread.mean().item()

    def follow_power(self, power: torch.Tensor, share: float, most: float, rows: int | None = None) -> None:
        """Column scales for rounding to nearest, from the mean square `[columns]` of the inputs; `rows` as above."""
        if not torch.isfinite(power).all() or power.sum() <= 0 or (rows or len(self.weight)) < _SCALE_ROWS:
            return
        spread = -0.5 * torch.log2(power + 1e-3 * power.mean())
        scales = (share * (spread - spread.mean())).clamp(-most, most)
        self.log_scales = scales - scales.mean()

    def price_of(self, curvature: torch.Tensor) -> torch.Tensor:
        """Expected cost in nats of rounding a row with feedback, over its squared step, for `g_r` of the module
        docstring."""
        assert self.input_factor is not None, "`follow` comes first"
        return curvature.to(self.sigma) * (self._column_scales() / self.input_factor.diagonal()).square().sum() / 24

    def forget(self) -> None:
        """Free the matrices, which take the most memory; steps, scales and noise are kept."""
        self.input_factor = self.input_moment = None

    def _column_scales(self) -> torch.Tensor:
        """Column scales as they are stored, float32 `[columns]`."""
        if (exponents := self.column_exponents()) is None:
            return self.weight.new_ones(self.weight.shape[1], dtype=torch.float32)
        return torch.exp2(exponents.float() / GRID)

    def column_exponents(self) -> torch.Tensor | None:
        """Exponents of the column scales, int8 `[columns]`."""
        if self.log_scales is None:
            return None
        return torch.round(self.log_scales * GRID).clamp(-127, 127).to(torch.int8)


def data_free_steps(layer: Layer) -> torch.Tensor:
    """log2 of data-free steps `[rows]`: proportional to each row's standard deviation, finer in embedding tables."""
    return torch.log2(layer.sigma) + (_TABLE_STEP if layer.is_table else 0.0)


def inverse_factor(moment: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of a damped second moment `[n, n]`, float64."""
    moment = moment.double()
    mean = moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    moment = moment + damping * mean * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)


def round_with_feedback_reference(ratio, scale, low, high, factor) -> torch.Tensor:
    """Reference for [`round_with_feedback`]: each error is subtracted from all later columns at once."""
    ratio, codes = ratio.clone(), torch.empty_like(ratio)
    for j in range(ratio.shape[1]):
        codes[:, j] = torch.round(ratio[:, j] / scale[j]).clamp(low[j], high[j])
        error = (ratio[:, j] - codes[:, j] * scale[j]) / factor[j, j]
        ratio[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return codes


def round_with_feedback(ratio, scale, low, high, factor) -> torch.Tensor:
    """Codes by rounding column after column with error feedback (GPTQ).

    Args:
        ratio (`torch.Tensor` float `[rows, columns]`): weights over the steps of their rows.
        scale (`torch.Tensor` `[columns]`): column scales.
        low, high (`torch.Tensor` `[columns]`): range of the codes.
        factor (`torch.Tensor` `[columns, columns]`): upper Cholesky factor of the inverse second moment of the inputs.

    Returns:
        `torch.Tensor` `[rows, columns]` of the dtype of ratio.
    """
    codes, factor = torch.empty_like(ratio), factor.to(ratio)
    scales, lows, highs, diagonal = (x.tolist() for x in (scale, low, high, factor.diagonal()))
    columns = ratio.shape[1]
    for rows in range(0, len(ratio), _ROWS):
        rest = ratio[rows : rows + _ROWS].T.contiguous()  # transposed, so that columns are contiguous
        if rest.data_ptr() == ratio.data_ptr():
            rest = rest.clone()
        for first in range(0, columns, _BLOCK):
            last = min(first + _BLOCK, columns)
            errors = torch.empty_like(rest[first:last])
            for j in range(first, last):
                code = torch.round(rest[j] / scales[j]).clamp_(lows[j], highs[j])
                errors[j - first] = error = torch.add(rest[j], code, alpha=-scales[j]).div_(diagonal[j])
                rest[j] = code
                if j + 1 < last:
                    rest[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
            if last < columns:
                rest[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
        codes[rows : rows + _ROWS] = rest.T
    return codes


def _ratios(layer: Layer, base: float, exponents: torch.Tensor, rows=slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights over the steps of their rows, float32, and the column scales."""
    step = base * torch.exp2(exponents[rows].float() / GRID)
    ratio = layer.weight[rows].float() / step[:, None]
    columns = layer.column_exponents()
    scale = ratio.new_ones(ratio.shape[1]) if columns is None else torch.exp2(columns.to(ratio.device).float() / GRID)
    return ratio, scale


def quantize_layer(layer: Layer, multiplier: float, feedback: bool = True) -> QuantizedWeight:
    """Round one weight with the steps of `multiplier` (log2); `feedback=False` is round-to-nearest."""
    base, exponents = layer.steps(multiplier)
    ratio, scale = _ratios(layer, base, exponents)
    wide = wide_columns(ratio / scale)
    low, high = (torch.where(wide, float(far), near).to(ratio) for far, near in zip(CODE_RANGE, (-8.0, 7.0)))
    if feedback and layer.input_factor is not None:
        codes = round_with_feedback(ratio, scale, low, high, layer.input_factor)
    else:
        codes = torch.round(ratio / scale).clamp_(low, high)
    if layer.input_moment is not None:
        base *= _gain(ratio, codes * scale, layer.input_moment.to(ratio))
    codes = codes.to(torch.int16 if wide.any() else torch.int8)
    return QuantizedWeight(codes, torch.tensor(base).item(), exponents, GRID, layer.column_exponents())


def _gain(ratio: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    """Least-squares factor of the whole tensor: `<W, Q H> / <Q, Q H>`, from a sample of the rows of a long one."""
    every = -(-len(ratio) // _ROWS)
    ratio, rounded = ratio[::every], rounded[::every]
    product = rounded @ moment
    power = (rounded * product).sum().item()
    gain = (ratio * product).sum().item() / power if power > 0 else 1.0
    return gain if 0.5 < gain < 2 else 1.0


def _entropy(codes: torch.Tensor) -> float:
    """Bits of all codes at the entropy of each class of columns with similar spread."""
    order, bits = codes.abs().mean(0).argsort(), 0.0
    codes = codes.to(torch.int16)
    for columns in order.chunk(_CLASSES):
        part = codes[:, columns].flatten()
        counts = torch.bincount((part - part.min()).int()).double()
        counts = counts[counts > 0]
        bits += float(counts.sum() * counts.sum().log2() - (counts * counts.log2()).sum())
    return bits


@torch.no_grad()
def predicted_bytes(layer: Layer, multiplier: float) -> float:
    """Predicted bytes of the stream at `multiplier`, without rounding with feedback; for a large weight, from a sample
    of rows.

    Rounding errors are nearly uniform and independent, and feedback is linear in them: codes with feedback are
    distributed like rounded weights with normal noise of the variance `layer.noise`.
    """
    rows, columns = layer.weight.shape
    count = min(rows, max(16, _SAMPLE // columns))
    chosen = torch.linspace(0, rows - 1, count).long().to(layer.weight.device)
    base, exponents = layer.steps(multiplier)
    ratio, scale = _ratios(layer, base, exponents, chosen)
    if layer.noise is not None:
        generator = torch.Generator().manual_seed(0)
        ratio += torch.randn(ratio.shape, generator=generator).to(ratio) * layer.noise.sqrt().to(ratio)
    codes = torch.round(ratio / scale).clamp_(*CODE_RANGE)
    if count == rows:
        return stream_bytes(QuantizedWeight(codes.to(torch.int16), 1.0, exponents, GRID, layer.column_exponents()))
    side = 0.6 * rows + (0 if layer.log_scales is None else 0.6 * columns) + 64
    return _CODER * _entropy(codes) / 8 * rows / count + side


def find_multiplier(layers: list[Layer], room: float, start: float = -1.0) -> tuple[float, list[float]]:
    """The multiplier at which the layers are predicted to take `room` bytes (the largest if none does), and their
    sizes."""
    elements = sum(layer.weight.numel() for layer in layers)
    at, slope = start, -elements / 8  # bytes saved per octave
    sizes = [predicted_bytes(layer, at) for layer in layers]
    for _ in range(12):
        held = sum(sizes)
        if abs(held / room - 1) < 0.002:
            break
        move = max(-4.0, min(4.0, (room - held) / slope))
        at += move
        sizes = [predicted_bytes(layer, at) for layer in layers]
        slope = max(min((sum(sizes) - held) / move, -elements / 80), -elements / 8)
    return at, sizes


def predicted_divergence(layers: list[Layer], multiplier: float) -> float:
    """Nats of divergence from the float model to second order, from the prices of the layers that have one."""
    total = 0.0
    for layer in layers:
        if layer.price is not None:
            base, exponents = layer.steps(multiplier)
            step = base * torch.exp2(exponents.to(layer.price) / GRID)
            total += (layer.price * step.square()).sum().item()
    return total


def room_of(layers: list[Layer], budget: float, overhead: float) -> float:
    """Bytes available for the streams; raises `ValueError` if that is too little for any code."""
    elements = sum(layer.weight.numel() for layer in layers)
    if budget - overhead < elements / 16:
        raise ValueError(
            f"A budget of {budget:.0f} bytes leaves {max(budget - overhead, 0):.0f} for {elements} weights besides"
            f" {overhead:.0f} bytes of other tensors and headers; ask for at least half a bit per weight more than"
            " those take."
        )
    return budget - overhead


def fit(
    quantize: Callable[[float], list[QuantizedWeight]], room: float, elements: int, start: float, slack: float
) -> tuple[list[QuantizedWeight], int, float]:
    """(weights, bytes, multiplier) of `quantize(multiplier)`: at most `room` bytes, and at least `room - slack`.

    Raises:
        ValueError: even the longest steps take more.
    """
    best, at, slope, last, lowest = None, start, -elements / 8, None, None
    for attempt in range(12):
        weights = quantize(at)
        held = sum(stream_bytes(weight) for weight in weights)
        if last is not None and last[0] != at:
            slope = max(min((held - last[1]) / (at - last[0]), -elements / 80), -elements / 7)
        last = at, held
        if held <= room and (best is None or held > best[1]):
            best = weights, held, at
        if held > room:
            lowest = at if lowest is None else max(lowest, at)
        if best is not None and (best[1] >= room - slack or attempt > 7):
            break
        at += (room - min(0.5 + 0.25 * attempt, 2.0) * slack / 2 - held) / slope
        if best is not None and lowest is not None:  # between one too large and one too small
            at = min(max(at, 0.9 * lowest + 0.1 * best[2]), 0.1 * lowest + 0.9 * best[2])
    if best is None:
        raise ValueError(
            f"{8 * room / elements:.2f} bits per weight are out of reach: steps of {_MAX_STEP} standard deviations"
            f" still need {8 * held / elements:.2f}; ask for more bits."
        )
    return best


def search(layers: list[Layer], budget: float | None, overhead: float, tolerance: float = 0.006):
    """Codes of all layers, each rounded to nearest, at the multiplier whose file is the budget.

    Args:
        layers (`list[Layer]`): the weights.
        budget (`float`, *optional*): bytes of the file; `None` means steps of half a standard deviation.
        overhead (`float`): bytes of the file that are not these streams.
        tolerance (`float`): accepted gap below the budget, as a share of it.

    Returns:
        `list[QuantizedWeight]`.
    """

    def nearest(multiplier: float) -> list[QuantizedWeight]:
        return [quantize_layer(layer, multiplier, feedback=False) for layer in layers]

    if budget is None:
        return nearest(-1.0)
    room, elements = room_of(layers, budget, overhead), sum(layer.weight.numel() for layer in layers)
    start, _ = find_multiplier(layers, (1 - tolerance / 2) * room)
    weights, held, _ = fit(nearest, room, elements, start, tolerance * room)
    if held < 0.97 * room:
        logger.warning(
            "The file has %.0f bytes of a budget of %.0f: the steps cannot be finer.", held + overhead, budget
        )
    return weights
