"""Products of 4-bit weights in int8: activations are rounded to int8 too, to use the processor's integer units.

Integer products take half the time of bfloat16 ones. Rows of activations have one scale each. Where one byte is not
enough, as for the outliers that every language model has, held codes are multiplied by two bytes, one after the other.
Codes of more than one digit (see `ecq_stream_flashlite`) are put together first, where they fit into int8.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .rare_flashlite import RareDigits
from .tiles_flashlite import TILE_ROWS, derived, group_of, join_columns, unpack

_INT8_ERROR = 0.015  # largest relative error of the output from rounding activations

_int8_held: ContextVar[WeakIdKeyDictionary | None] = ContextVar("int8_codes", default=None)
_fitting = WeakIdKeyDictionary()


@contextlib.contextmanager
def int8_codes(held: WeakIdKeyDictionary | None = None) -> Iterator[WeakIdKeyDictionary]:
    """Context in which weights of products of several rows are kept as int8 for oneDNN, one byte more per weight.

    For batched decoding, which multiplies by every weight for each token, so that unpacking dominates. Preparing them
    takes as long as unpacking twenty times. It has no effect on processors other than x86.

    Args:
        held (`WeakIdKeyDictionary`, *optional*): what an earlier region held, to go on with; entries live no longer
            than their tiles. By default all is let go of at the end.

    Yields:
        `WeakIdKeyDictionary` of what is held, by tiles.
    """
    held = WeakIdKeyDictionary() if held is None else held
    capable = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    token = _int8_held.set(held if capable else None)
    try:
        yield held
    finally:
        _int8_held.reset(token)


def held_codes() -> WeakIdKeyDictionary | None:
    """The weights kept by the surrounding [`int8_codes`]; `None` outside."""
    return _int8_held.get()


def digits_of(numbers: torch.Tensor, factors: torch.Tensor, columns: int) -> torch.Tensor:
    """What a code of the tiles' columns from `columns` on counts, `[Kp - K, 1]`: 16 or 256, and 0 for padding."""
    return (factors[columns:] / factors[numbers[columns:]])[:, None]


def _whole(tiles: torch.Tensor, first: int, columns: int, numbers, factors, rare) -> torch.Tensor:
    """Codes with all their digits of the tiles from row `first` on, int8 `[K, 64 * tiles]`; see [`_fits`]."""
    codes = unpack(tiles)
    whole = codes[:columns]
    if numbers is not None:
        wide = codes[columns:].to(torch.int16).mul_(digits_of(numbers, factors, columns).to(torch.int16))
        whole = whole.to(torch.int16).index_add_(0, numbers[columns:], wide).to(torch.int8)
    return whole if rare is None else rare.add_to(whole.contiguous(), first)


def _fits(tiles: torch.Tensor, columns: int, numbers, factors, rare: RareDigits | None) -> bool:
    """Whether codes with all digits are guaranteed to be in -128..127."""

    def look(tiles: torch.Tensor) -> bool:
        if rare is not None and not -128 < rare.values.min() <= rare.values.max() < 128:
            return False
        if numbers is None:
            return True
        second = tiles[:, columns:]
        # a digit of -8 is the nibble 0, and the sum of 16 * -8 and a negative code is below -128
        lowest = min(int((second & 15).min()), int((second >> 4).min()))
        return lowest > 0 and float(digits_of(numbers, factors, columns).max()) <= 16

    return numbers is None and rare is None or derived(_fitting, tiles, look)


def _noise(x: torch.Tensor, peak: torch.Tensor) -> float:
    """Root of the summed squared error that rounding rows of x `[M, K]` with these peaks `[M, 1]` to int8 makes."""
    # rounding to a quantum q has variance q^2 / 12
    return float(torch.linalg.vector_norm(peak)) / 127 * math.sqrt(x.shape[1] / 12)


def _peak(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True)


def _scale(peak: torch.Tensor) -> torch.Tensor:
    return peak.clamp(min=torch.finfo(torch.float32).tiny * 127).div_(127)


def held_linear(x: torch.Tensor, tiles: torch.Tensor, step: torch.Tensor, numbers=None, factors=None, rare=None):
    """x `[M, K]` times the weights, held as int8: `[M, N]` in x's dtype. Arguments as in `int4_linear`.

    Where one byte of activations is not enough, a second one takes what the first leaves, in M more rows of the same
    product. `None` for codes that do not fit, and for activations that are not finite.
    """
    held, out_features, columns = held_codes(), len(step), x.shape[1]
    if held is None or not _fits(tiles, columns, numbers, factors, rare):
        return None

    def pack(tiles):
        group = group_of(TILE_ROWS * tiles.shape[1], tiles.device)
        rows = range(0, len(tiles) * TILE_ROWS, group * TILE_ROWS)
        parts = [_whole(part, row, columns, numbers, factors, rare).t() for row, part in zip(rows, tiles.split(group))]
        codes = torch.cat(parts)[:out_features]
        return torch.ops.onednn.qlinear_prepack(codes, None), torch.zeros(out_features, dtype=torch.long, device="cpu")

    states = x.to(torch.float32, copy=True) if factors is None else x.to(torch.float32) * factors[:columns]
    peak = _peak(states)
    error, norm = _noise(states, peak), float(torch.linalg.vector_norm(states))
    if not math.isfinite(error + norm):
        return None
    # few significant bits, so that scaling bfloat16 sums is one operation and exact
    scale = _scale(peak).bfloat16()
    rounded = states.div_(scale).round()
    if error > _INT8_ERROR * norm:
        rounded = torch.cat([rounded, states.sub_(rounded).mul_(254).round_()])
    # oneDNN needs unsigned activations: flipping the sign bit adds 128
    rounded = rounded.to(torch.int8).view(torch.uint8).bitwise_xor(128)
    packed, zeros = derived(held, tiles, pack)
    dtype = x.dtype if x.dtype in (torch.bfloat16, torch.float32) else torch.float32
    out = torch.ops.onednn.qlinear_pointwise.default(
        rounded, 1.0, 128, packed, step.detach(), zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    if len(out) > len(x):
        out = torch.add(out[: len(x)], out[len(x) :], alpha=1 / 254)
    return out.mul_(scale).to(x.dtype)


def int8_matmul(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor | None:
    """x `[M, K]` times codes `[K, 64 * tiles]`, rows of x rounded to int8: float32; `None` if outliers forbid it."""
    states = x.to(torch.float32)
    peak = _peak(states)
    if not _noise(states, peak) <= _INT8_ERROR * float(torch.linalg.vector_norm(states)):
        return None
    scale = _scale(peak)
    rounded, group = states.div(scale).round_().to(torch.int8), group_of(TILE_ROWS * tiles.shape[1], x.device)
    parts = [torch._int_mm(rounded, unpack(part)[: x.shape[1]]) for part in tiles.split(group)]
    return join_columns([part.to(torch.float32).mul_(scale) for part in parts])
