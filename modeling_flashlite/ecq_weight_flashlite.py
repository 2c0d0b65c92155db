"""A quantized weight matrix with its steps and column scales: as codes, and as tiles of digits in memory.

`w[r, c] = code[r, c] * step[r] * column_scale[c]` with integer codes. Steps are `base * 2 ** (exponent[r] / grid)` and
column scales, which are optional, `2 ** (exponent[c] / grid)`: small integers, which take almost no space on disk and
give the same bytes at every save.

**Digits.** The alphabet is not limited to 16 levels, because real weights have outlier columns. A code is a number of
up to three balanced digits of base 16, `code = d0 + 16 d1 + 256 d2` with each digit in -8..7, so -2184..1911. Most
columns need one digit; a *wide* column, in which any code is outside -8..7, has two, or three beyond -136..119. In
memory the higher digits of a column are an additional column of the same int4 matrix, whose inputs are those of their
column times 16 or 256, at half a byte per digit; where few of them are not zero, they are `rare_flashlite`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from .rare_flashlite import RareDigits
from .tiles_flashlite import TILE_ROWS, empty_tiles, tile_codes, untile_codes

CODE_RANGE = -2184, 1911  # three balanced digits of base 16
GRID = 16
_ONE_DIGIT, _TWO_DIGITS = (-8, 7), (-136, 119)
_RARE = 0.5  # share of words of 16 digits that are not all zero, below which a list is less to read and to hold
_LEAST_SAVED = 1 << 19  # bytes, below which reading the zeros takes less time than the operations for a list
_ZEROS = -0x7777777777777778  # a word of tiles that holds 16 zeros, 0x88 in all its bytes


class _Scaled:
    """Steps and column scales from their exponents."""

    base: float
    exponents: torch.Tensor
    grid: int
    column_exponents: torch.Tensor | None

    def step(self) -> torch.Tensor:
        """Steps, float32 `[rows]`."""
        return _powers(self.base, self.exponents, self.grid)

    def column_scale(self) -> torch.Tensor | None:
        """Scales, float32 `[columns]`, or `None` where all are 1."""
        return None if self.column_exponents is None else _powers(1.0, self.column_exponents, self.grid)


@dataclass
class QuantizedWeight(_Scaled):
    """A quantized matrix as it is searched: `w[r, c] = codes[r, c] * step()[r] * column_scale()[c]`.

    Attributes:
        codes (`torch.Tensor` int8 or int16 `[rows, columns]`): integers in `CODE_RANGE`, -2184..1911. In memory a few
            codes outside -8..7 cost some bytes each, many in a column half a byte for each of its weights; the file
            pays for what it holds, not for the range. See [`wide_columns`].
        base (`float`): step of exponent 0, a float32 value.
        exponents (`torch.Tensor` int8 `[rows]`): `step = base * 2 ** (exponents / grid)`.
        grid (`int`): exponents per octave.
        column_exponents (`torch.Tensor` int8 `[columns]`, *optional*): `column_scale = 2 ** (exponents / grid)`. At
            run time a layer's input is multiplied by it, a table's output rows likewise.
    """

    codes: torch.Tensor
    base: float
    exponents: torch.Tensor
    grid: int = GRID
    column_exponents: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The weight, float32 `[rows, columns]`."""
        weight = self.codes.float() * self.step()[:, None].to(self.codes.device)
        scale = self.column_scale()
        return weight if scale is None else weight.mul_(scale.to(weight.device))


@functools.lru_cache(maxsize=16)
def _octaves(grid: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.exp2(torch.arange(-128, 128, dtype=torch.float64, device="cpu") / grid)


def _powers(base: float, exponents: torch.Tensor, grid: int) -> torch.Tensor:
    """`base * 2 ** (exponents / grid)` of int8 exponents, float32."""
    return (_octaves(grid).to(exponents.device)[exponents.long() + 128] * base).float()


def share_scales(column_exponents: Sequence[torch.Tensor | None]) -> bool:
    """Whether weights with these column exponents have the same column scales, as one product of them needs."""
    return all(
        a is None and b is None or a is not None and b is not None and torch.equal(a, b)
        for a, b in pairwise(column_exponents)
    )


def wide_columns(ratio: torch.Tensor, share: float = 0.15) -> torch.Tensor:
    """Columns that deserve codes beyond -8..7.

    Args:
        ratio (`torch.Tensor` float `[rows, columns]`): weights over their steps (and column scales).
        share (`float`): the squared error of clipping to -8..7, over that of rounding (1/12), that a column may have.

    Returns:
        `torch.Tensor` bool `[columns]`.
    """
    clipped = (ratio.abs() - (_ONE_DIGIT[1] + 0.5)).clamp(min=0).square().mean(0)
    return clipped > share / 12


@dataclass
class TiledWeight(_Scaled):
    """A quantized matrix in its memory layout.

    Attributes:
        shape (`tuple[int, int]`): rows, columns.
        tiles (`torch.Tensor` uint8 `[ceil(rows / 64), padded, 32]`): tiles of `tiles_flashlite` of a matrix whose
            columns are the first digits of all columns, then the second of `wide[0]`, then the third of `wide[1]`.
        wide (pair of `torch.Tensor` int64): increasing numbers of the columns whose second, and whose third digits are
            in the tiles.
        base, exponents, grid, column_exponents: as in [`QuantizedWeight`].
        rare ([`RareDigits`], *optional*): the second and third digits of all other columns.
    """

    shape: tuple[int, int]
    tiles: torch.Tensor
    wide: tuple[torch.Tensor, torch.Tensor]
    base: float
    exponents: torch.Tensor
    grid: int = GRID
    column_exponents: torch.Tensor | None = None
    rare: RareDigits | None = None

    @classmethod
    def of(cls, weight: QuantizedWeight) -> TiledWeight:
        """The same matrix in tiles, on the device of its codes."""
        return thin_out([cls.whole(weight)])[0]

    @classmethod
    def whole(cls, weight: QuantizedWeight, wide: tuple[torch.Tensor, torch.Tensor] | None = None) -> TiledWeight:
        """The same matrix with all digits in its tiles, zeros of the columns `wide` too."""
        codes, columns = weight.codes, weight.codes.shape[1]
        second, third = wide = digit_columns(codes) if wide is None else wide
        digits = torch.cat([codes, codes[:, second], codes[:, third]], dim=1) if len(second) else codes
        offsets = digits.new_full((digits.shape[1],), 8, dtype=torch.int16)
        shifts = torch.zeros_like(offsets)
        offsets[columns : columns + len(second)], offsets[columns + len(second) :] = 136, 2184
        shifts[columns : columns + len(second)], shifts[columns + len(second) :] = 4, 8
        if len(second):
            digits = ((digits.to(torch.int16) + offsets) >> shifts & 15) - 8
        tiles = tile_codes(digits.to(torch.int8))
        return cls(weight.shape, tiles, wide, weight.base, weight.exponents, weight.grid, weight.column_exponents)

    def codes(self) -> torch.Tensor:
        """Codes `[rows, columns]`, int8 where there is one digit, else int16."""
        (rows, columns), (second, third), rare = self.shape, self.wide, self.rare
        digits = untile_codes(self.tiles, rows, columns + len(second) + len(third))
        if digits.shape[1] == columns and rare is None:
            return digits
        codes = digits[:, :columns].to(torch.int16)
        codes[:, second] += 16 * digits[:, columns : columns + len(second)].to(torch.int16)
        codes[:, third] += 256 * digits[:, columns + len(second) :].to(torch.int16)
        if rare is not None:
            codes.view(-1).index_add_(0, rare.rows() * columns + rare.columns, rare.values.to(torch.int16))
        return codes

    def quantized(self) -> QuantizedWeight:
        """The same matrix with plain codes."""
        return QuantizedWeight(self.codes(), self.base, self.exponents, self.grid, self.column_exponents)

    def inputs(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the tiles' columns multiply: numbers of the inputs, int64, and factors, float32, both `[padded]`.

        Numbers are `None` where they are 0, 1, 2, ...; factors where all are 1.
        """
        (second, third), scale = self.wide, self.column_scale()
        if not len(second) + len(third):
            return None, scale
        columns, device = self.shape[1], second.device
        starts = [columns, columns + len(second), columns + len(second) + len(third), self.tiles.shape[1]]
        numbers = torch.zeros(starts[3], dtype=torch.int64, device=device)
        torch.cat([torch.arange(columns, device=device), second, third], out=numbers[: starts[2]])
        factors = torch.ones(starts[3], device=device)
        for start, end, factor in zip(starts, starts[1:], (16.0, 256.0, 0.0)):
            factors[start:end] = factor
        return numbers, factors if scale is None else factors.mul_(scale.to(device)[numbers])


def thin_out(weights: Sequence[TiledWeight]) -> list[TiledWeight]:
    """The same matrices, columns of higher digits that are nearly all zero taken out of their tiles.

    Each matrix decides for itself, so that its products are the same whatever it lies beside.

    Args:
        weights (sequence of [`TiledWeight`]): matrices with the same wide columns, and no rare digits. The wide
            columns that are left are those of all of them, and their tiles neighbours in memory, as for one product.
    """
    columns, (second, third) = weights[0].shape[1], weights[0].wide
    kept = [_often(weight.tiles[:, columns : columns + len(second) + len(third)]) for weight in weights]
    some = torch.stack(kept).any(0)
    if some.all() and all(own.all() for own in kept):
        return list(weights)
    wide = second[some[: len(second)]], third[some[len(second) :]]
    places, sizes = columns + some.nonzero().flatten(), [len(weight.tiles) for weight in weights]
    tiles, found = empty_tiles(TILE_ROWS * sum(sizes), columns + len(places), some.device), []
    for weight, own, often in zip(weights, tiles.split(sizes), kept):
        own[:, :columns] = weight.tiles[:, :columns]
        own[:, columns:] = 0x88
        held = often[places - columns]
        own[:, columns : columns + len(places)][:, held] = weight.tiles[:, places[held]]
        parts = [
            _entries(weight.tiles[:, columns:][:, part], ~often[part], numbers, unit)
            for part, numbers, unit in (
                (slice(0, len(second)), second, 16),
                (slice(len(second), len(often)), third, 256),
            )
        ]
        rows, numbers, values = map(torch.cat, zip(*parts))
        found.append(replace(weight, tiles=own, wide=wide, rare=RareDigits.of(rows, numbers, values, weight.shape[0])))
    return found


def _often(digits: torch.Tensor) -> torch.Tensor:
    """Which columns of tiles of digits `[T, columns, 32]` stay; all of them where too little would be saved."""
    column = 32 * len(digits)  # bytes
    if digits.shape[1] * column < _LEAST_SAVED:
        return torch.ones(digits.shape[1], dtype=torch.bool, device=digits.device)
    often = (digits.view(torch.int64) != _ZEROS).sum((0, 2)) > _RARE * 4 * len(digits)
    return often | (int((~often).sum()) * column < _LEAST_SAVED)


def _entries(
    tiles: torch.Tensor, chosen: torch.Tensor, numbers: torch.Tensor, unit: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, columns and values of the digits of tiles `[T, columns, 32]` that are not zero, of the chosen columns."""
    words, numbers = tiles[:, chosen].view(torch.int64), numbers[chosen]
    tile, column, word = (words != _ZEROS).nonzero().unbind(1)
    pairs = words[tile, column, word].view(torch.uint8).view(-1, 8)
    word_of, byte = (pairs != 0x88).nonzero().unbind(1)
    pairs, rows = pairs[word_of, byte].to(torch.int64), (TILE_ROWS * tile + 8 * word)[word_of] + byte
    columns, low, high = numbers[column[word_of]], (pairs & 15) - 8, (pairs >> 4) - 8
    some_low, some_high = low != 0, high != 0
    return (
        torch.cat([rows[some_low], rows[some_high] + TILE_ROWS // 2]),
        torch.cat([columns[some_low], columns[some_high]]),
        unit * torch.cat([low[some_low], high[some_high]]),
    )


def digit_columns(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the columns with at least two, and with three digits."""
    if codes.numel() == 0:
        raise ValueError(f"A weight of shape {tuple(codes.shape)} has no codes; leave this layer out.")
    low, high = (end.to(torch.int32) for end in torch.aminmax(codes, dim=0))
    if codes.is_floating_point() or low.min() < CODE_RANGE[0] or high.max() > CODE_RANGE[1]:
        raise ValueError(
            f"Codes must be integers in {CODE_RANGE[0]}..{CODE_RANGE[1]}, but they are {codes.dtype} and span"
            f" {low.min()}..{high.max()}; clamp them first."
        )
    second, third = (((low < a) | (high > b)).nonzero().flatten() for a, b in (_ONE_DIGIT, _TWO_DIGITS))
    return second, third
