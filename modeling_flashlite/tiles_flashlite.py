"""Tiles: 4-bit codes as they lie in memory, for products, look-ups and saving alike.

A weight is w[n, k] = code[n, k] * step[n] with codes -8..7 and one float32 step per row. Codes lie in *tiles*, uint8
`[ceil(N / 64), Kp, 32]` with Kp = K rounded up to 32: byte (b, k, j) holds code + 8 of row 64 b + j in its low nibble
and of row 64 b + j + 32 in its high nibble; padding is code 0. That is what PyTorch's AVX-512 int4 kernel reads, so
half a byte per weight is all there is: nothing is kept twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

TILE_ROWS = 64
_GROUP_WEIGHTS = 1 << 20  # weights unpacked at a time, to stay in the cache


def _padded(columns: int) -> int:
    """Columns of tiles for so many columns of codes.

    A multiple of 32. A few more than needed can take less memory, since the kernel's scales are then fewer:
    608 = 19 * 32 columns need one per 32 weights, 640 = 5 * 128 one per 128.
    """
    least = -(-columns // 32) * 32
    return min(range(least, least + 256, 32), key=lambda padded: padded * (1 + 8 / kernel_group(padded)))


def empty_tiles(rows: int, columns: int, device=None) -> torch.Tensor:
    """Room for the tiles of codes `[N, K]`, not initialised: uint8 `[ceil(N / 64), Kp, 32]`."""
    return torch.empty(-(-rows // TILE_ROWS), _padded(columns), 32, dtype=torch.uint8, device=device)


def tile_codes(codes: torch.Tensor) -> torch.Tensor:
    """Tiles of codes.

    Args:
        codes (`torch.Tensor` int8 `[N, K]`): -8..7.

    Returns:
        `torch.Tensor` uint8 `[ceil(N / 64), Kp, 32]`.
    """
    if codes.dtype != torch.int8 or codes.numel() and (codes.min() < -8 or codes.max() > 7):
        raise ValueError(
            f"Tiles hold int8 codes -8..7, not {codes.dtype} of {codes.min()}..{codes.max()}; clamp them first."
        )
    rows, columns = codes.shape
    tiles = empty_tiles(rows, columns, codes.device)
    padded, group = tiles.shape[1], group_of(TILE_ROWS * tiles.shape[1], codes.device)
    for first in range(0, len(tiles), group):
        part = (codes[TILE_ROWS * first : TILE_ROWS * (first + group)] + 8).view(torch.uint8)
        if len(part) % TILE_ROWS or padded != columns:
            part = F.pad(part, (0, padded - columns, 0, -len(part) % TILE_ROWS), value=8)
        halves = part.view(-1, 2, 32, padded)
        tiles[first : first + group] = (halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2)
    return tiles


def untile_codes(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of [`tile_codes`]: int8 `[rows, columns]`."""
    codes = tiles.new_empty(rows, columns, dtype=torch.int8)
    group = group_of(TILE_ROWS * tiles.shape[1], tiles.device)
    for first in range(0, len(tiles), group):
        part = tiles[first : first + group, :columns]
        nibbles = torch.stack([part & 15, part >> 4], 1).view(torch.int8).transpose(2, 3).reshape(-1, columns)
        into = codes[TILE_ROWS * first : TILE_ROWS * (first + group)]
        torch.sub(nibbles[: len(into)], 8, out=into)
    return codes


def unpack(tiles: torch.Tensor) -> torch.Tensor:
    """Codes as int8, K first: `[columns of the tiles, 64 * tiles]`."""
    low, high = (half.view(torch.int8).sub_(8) for half in (tiles & 15, tiles >> 4))
    # one cat moves 32 bytes at a time, three times as fast as a strided copy
    return torch.cat([half for pair in zip(low.unbind(0), high.unbind(0)) for half in pair], 1)


def group_of(size: int, device: torch.device) -> int:
    """How many slices of `size` weights to unpack at a time: what stays in a processor's cache, or all on a GPU."""
    return max(1, _GROUP_WEIGHTS // size) if device.type == "cpu" else 1 << 30


def dequantize_int4(
    tiles: torch.Tensor, step: torch.Tensor, in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The float weight: code * step.

    Args:
        tiles (`torch.Tensor` uint8 `[ceil(N / 64), Kp, 32]`): see [`tile_codes`].
        step (`torch.Tensor` `[N]`): one step per row; its length is N.
        in_features (`int`): K.
        dtype (`torch.dtype`): of the result; the product is rounded once.

    Returns:
        `torch.Tensor` `[N, K]`.
    """
    return (unpack(tiles)[:in_features, : step.numel()] * step).to(dtype).t().contiguous()


def join_columns(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def derived(held: WeakIdKeyDictionary, tiles: torch.Tensor, make: Callable[[torch.Tensor], Any]) -> Any:
    """What `make` makes of the tiles: made once, made again after they changed, held while they live."""
    version = None if tiles.is_inference() else tiles._version
    entry = held.get(tiles)
    if entry is None or entry[0] != version:
        with torch.inference_mode(tiles.is_inference()):  # else it may be used in training later
            entry = held[tiles] = version, make(tiles)
    return entry[1]


def kernel_group(padded: int) -> int:
    """How many columns share a scale, the kernel's largest choice that divides Kp."""
    return min(256, padded & -padded)
