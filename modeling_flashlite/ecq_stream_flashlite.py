"""The stored byte stream of a quantized weight matrix, see `ecq_weight_flashlite`; `ecq_reader_flashlite` decodes it.

Weight stream, version 1 (little endian), one uint8 tensor under the name of the weight
    ======  =====  ====================================================================================================
    offset  bytes  meaning
    ======  =====  ====================================================================================================
    0       1      magic 0xE9
    1       1      version, 1
    2       1      flags: 1 row exponents present (else all 0), 2 column exponents present (else no column scales)
    3       1      grid, exponents per octave, 1..255
    4       4      base, float32, positive
    8       4      CRC-32 of rows and columns (u32 each), bytes 0-7 and everything from byte 12
    12      1      groups G of columns, 1..32
    13      G      digits of each group, 1..3
    -       -      side chunks, each u32 length and payload: exponents of the rows (int8) if flag 1, of the columns
                   if flag 2, number of each column's group (u8) if G > 1
    -       4 n    directory: u32 length of each code chunk
    -       -      code chunks
    ======  =====  ====================================================================================================

Chunks are those of `codec_flashlite`. Columns of similar spread form a group with its own Huffman tables. The rows
are split into *bands* of whole tiles (64 rows, see `tiles_flashlite`) of about 4 MiB; every band has for each group,
in order, one chunk of bytes, or two where the group has three digits:
    1 digit   `[tiles, columns of the group, 32]`, byte j of a tile holds digit + 8 of row j in its low and of row
              j + 32 in its high nibble: the order of a loaded model's memory
    2 digits  `[2, tiles, columns, 32]` bytes code + 136: of rows 0..31 of the tiles, then of rows 32..63
    3 digits  the same of the low two digits, (code + 136) mod 256; then the third digits like the first
Where rows are left that fill no tile, R of them, a last tile follows in the last band: `[columns, R]` bytes, or
`[columns, ceil(R / 2)]` nibbles of rows j and j + ceil(R / 2).
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from .codec_flashlite import chunk_bytes, encode_chunk
from .ecq_weight_flashlite import QuantizedWeight, digit_columns
from .tiles_flashlite import TILE_ROWS

MAGIC, VERSION, HEAD = 0xE9, 1, 12
MAX_GROUPS, _NARROW_GROUPS, _WIDE_GROUPS = 32, 16, 8  # in a stream; to begin with
_BAND_BYTES = 1 << 22
_TABLE_BYTES = 96, 0.42  # cost of a Huffman table: fixed, a part of it for its time, and per symbol that occurs


def band_rows(rows: int, columns: int) -> list[tuple[int, int]]:
    """First and last row of each band; the last one takes the rows that fill no tile."""
    whole = rows // TILE_ROWS
    step = max(1, _BAND_BYTES // (32 * columns))
    starts = list(range(0, max(whole, 1), step))
    return [(a * TILE_ROWS, b * TILE_ROWS) for a, b in zip(starts, starts[1:])] + [(starts[-1] * TILE_ROWS, rows)]


def _nibbles(digits: np.ndarray) -> np.ndarray:
    """Digits of rows `[rows, columns]`, each + 8, to the bytes of a band, see the module's docstring."""
    rows, columns = digits.shape
    whole = rows // TILE_ROWS * TILE_ROWS
    halves = digits[:whole].reshape(-1, 2, 32, columns)
    parts = [(halves[:, 0] | halves[:, 1] << 4).transpose(0, 2, 1).reshape(-1)]
    if whole < rows:
        half = (rows - whole + 1) // 2
        low, high = digits[whole : whole + half], np.full((half, columns), 8, np.uint8)
        high[: rows - whole - half] = digits[whole + half :]
        parts.append((low | high << 4).T.reshape(-1))
    return np.concatenate(parts) if whole < rows else parts[0]


def _bytes(values: np.ndarray) -> np.ndarray:
    """Bytes of rows `[rows, columns]` in the order of a band."""
    rows, columns = values.shape
    whole = rows // TILE_ROWS * TILE_ROWS
    first = values[:whole].reshape(-1, 2, 32, columns).transpose(1, 0, 3, 2).reshape(-1)
    return np.concatenate([first, values[whole:].T.reshape(-1)]) if whole < rows else first


def _parts(codes: np.ndarray, digits: int) -> list[np.ndarray]:
    """Bytes of one band of one group: codes `[rows, columns]` to one or two arrays to be coded."""
    if digits == 1:
        return [_nibbles((codes + 8).astype(np.uint8))]
    shifted = codes.astype(np.int16) + 136
    low = _bytes((shifted & 255).astype(np.uint8))
    return [low] if digits == 2 else [low, _nibbles(((shifted >> 8) + 8).astype(np.uint8))]


@dataclass
class _Layout:
    """How a matrix is stored: number of each column's group, digits of each group, bytes of the chunks of codes."""

    groups: np.ndarray
    digits: list[int]
    size: int


def _histograms(codes: np.ndarray, digits: int, bands: list[tuple[int, int]]) -> np.ndarray:
    """Histograms `[chunks, 256]` of one group `[rows, columns]`: band after band, part after part."""
    parts = [_parts(codes[first:last], digits) for first, last in bands]
    return np.stack(
        [torch.bincount(torch.from_numpy(part), minlength=256).numpy() for part in itertools.chain(*parts)]
    )


def _cost(histograms: np.ndarray) -> float:
    """About how many bytes the chunks with these histograms take, their tables included."""
    total = histograms.sum(-1, keepdims=True)
    entropy = (histograms * np.log2(np.maximum(total, 1) / np.maximum(histograms, 1))).sum()
    return entropy / 8 + (_TABLE_BYTES[0] + _TABLE_BYTES[1] * (histograms > 0).sum(-1)).sum()


def _layout(weight: QuantizedWeight) -> tuple[_Layout, np.ndarray]:
    """The best groups of columns: fine groups of alike spread, neighbours joined while that saves bytes."""
    codes = weight.codes.cpu().numpy()
    second, third = (part.cpu().numpy() for part in digit_columns(weight.codes))
    spread = torch.from_numpy(codes).abs().sum(0, dtype=torch.int64).numpy()
    kinds = np.ones(codes.shape[1], dtype=np.int64)
    kinds[second], kinds[third] = 2, 3
    numbers, size, bands = np.zeros(codes.shape[1], dtype=np.uint8), 0, band_rows(*codes.shape)
    digits: list[int] = []
    for kind in np.unique(kinds):
        own = np.flatnonzero(kinds == kind)
        own = own[np.argsort(spread[own], kind="stable")]
        fine = min(_NARROW_GROUPS if kind == 1 else _WIDE_GROUPS, max(1, codes.shape[0] * len(own) // 4096), len(own))
        groups = [(part, _histograms(codes[:, part], int(kind), bands)) for part in np.array_split(own, fine)]
        for part, histograms in _joined(groups, codes.shape[1]):
            numbers[part] = len(digits)
            digits.append(int(kind))
            size += sum(4 + chunk_bytes(histogram) for histogram in histograms)
    return _Layout(numbers, digits, size), codes


def _joined(groups: list[tuple[np.ndarray, np.ndarray]], columns: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Join neighbours, the best saving first, until no join saves."""
    costs = [_cost(histograms) for _, histograms in groups]
    pairs = [_cost(a[1] + b[1]) for a, b in itertools.pairwise(groups)]
    while pairs:
        savings = [costs[i] + costs[i + 1] + columns / 16 - pair for i, pair in enumerate(pairs)]
        best = max(range(len(savings)), key=savings.__getitem__)
        if savings[best] < 0:
            break
        (first, a), (last, b) = groups[best : best + 2]
        groups[best : best + 2] = [(np.concatenate([first, last]), a + b)]
        costs[best : best + 2] = [pairs[best]]
        near = range(max(best - 1, 0), min(best + 1, len(groups) - 1))
        pairs[max(best - 1, 0) : best + 2] = [_cost(groups[i][1] + groups[i + 1][1]) for i in near]
    return groups


def _head(weight: QuantizedWeight, layout: _Layout) -> tuple[bytes, bytes]:
    """Bytes 0-7, and those from byte 12 to the directory."""
    if not 0 < weight.base < math.inf:
        raise ValueError(f"The step of a weight is {weight.base}, but must be finite and positive; check the weights.")
    sides, flags = [], 0
    exponents = weight.exponents.cpu().numpy().astype(np.int8)
    if exponents.any():
        sides.append(exponents)
        flags |= 1
    if weight.column_exponents is not None and weight.column_exponents.any():
        sides.append(weight.column_exponents.cpu().numpy().astype(np.int8))
        flags |= 2
    if len(layout.digits) > 1:
        sides.append(layout.groups)
    rest = bytes([len(layout.digits), *layout.digits])
    for side in sides:
        payload = encode_chunk(side.view(np.uint8))
        rest += struct.pack("<I", len(payload)) + payload
    return struct.pack("<BBBBf", MAGIC, VERSION, flags, weight.grid, weight.base), rest


def stream_bytes(weight: QuantizedWeight) -> int:
    """Bytes of [`encode_weight`]'s stream, exactly, without coding."""
    layout, _ = _layout(weight)
    return HEAD + len(_head(weight, layout)[1]) + layout.size


def encode_weight(weight: QuantizedWeight) -> torch.Tensor:
    """The stored stream, uint8 `[bytes]`; it depends on the values only."""
    layout, codes = _layout(weight)
    head, rest = _head(weight, layout)
    groups = [np.ascontiguousarray(codes[:, layout.groups == i]) for i in range(len(layout.digits))]
    chunks = [
        encode_chunk(part)
        for first, last in band_rows(*codes.shape)
        for group, digits in zip(groups, layout.digits)
        for part in _parts(group[first:last], digits)
    ]
    rest += struct.pack(f"<{len(chunks)}I", *map(len, chunks)) + b"".join(chunks)
    check = zlib.crc32(rest, zlib.crc32(struct.pack("<II", *weight.shape) + head))
    return torch.frombuffer(bytearray(head + struct.pack("<I", check) + rest), dtype=torch.uint8)
