"""The stored byte stream of a quantized weight matrix, see `ecq_weight_flashlite`.

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
    2 digits  `[tiles, columns, 64]` bytes code + 136
    3 digits  the same of the low two digits, (code + 136) mod 256; then the third digits like the first
Where rows are left that fill no tile, R of them, a last tile follows in the last band: R (bytes) or ceil(R / 2)
(nibbles of rows j and j + ceil(R / 2)) in place of 64 and 32.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from .codec_flashlite import CodecError, chunk_bytes, decode_chunk, encode_chunk
from .ecq_weight_flashlite import QuantizedWeight, TiledWeight, digit_columns
from .tiles_flashlite import TILE_ROWS, empty_tiles

_MAGIC, _VERSION, _HEAD = 0xE9, 1, 12
_MAX_GROUPS, _NARROW_GROUPS, _WIDE_GROUPS = 32, 16, 8  # in a stream; to begin with
_BAND_BYTES = 1 << 22
_TABLE_BYTES = 96, 0.42  # cost of a Huffman table: fixed, a part of it for its time, and per symbol that occurs
_TASK_BYTES = 1 << 16
_MOST_CODES = 4096  # in a byte of a stream; deflate reaches 2064
_AHEAD = 1 << 22  # bytes of streams decoded or queued, per worker


def _bands(rows: int, columns: int) -> list[tuple[int, int]]:
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
    first = values[:whole].reshape(-1, TILE_ROWS, columns).transpose(0, 2, 1).reshape(-1)
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
    numbers, size, bands = np.zeros(codes.shape[1], dtype=np.uint8), 0, _bands(*codes.shape)
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
    return struct.pack("<BBBBf", _MAGIC, _VERSION, flags, weight.grid, weight.base), rest


def stream_bytes(weight: QuantizedWeight) -> int:
    """Bytes of [`encode_weight`]'s stream, exactly, without coding."""
    layout, _ = _layout(weight)
    return _HEAD + len(_head(weight, layout)[1]) + layout.size


def encode_weight(weight: QuantizedWeight) -> torch.Tensor:
    """The stored stream, uint8 `[bytes]`; it depends on the values only."""
    layout, codes = _layout(weight)
    head, rest = _head(weight, layout)
    groups = [np.ascontiguousarray(codes[:, layout.groups == i]) for i in range(len(layout.digits))]
    chunks = [
        encode_chunk(part)
        for first, last in _bands(*codes.shape)
        for group, digits in zip(groups, layout.digits)
        for part in _parts(group[first:last], digits)
    ]
    rest += struct.pack(f"<{len(chunks)}I", *map(len, chunks)) + b"".join(chunks)
    check = zlib.crc32(rest, zlib.crc32(struct.pack("<II", *weight.shape) + head))
    return torch.frombuffer(bytearray(head + struct.pack("<I", check) + rest), dtype=torch.uint8)


class _Stream:
    """A stream with its head read and every length checked against the shape; [`fill`] decodes it chunk by chunk.

    Nothing larger than a side chunk is allocated before [`open`].
    """

    def __init__(self, name: str, stream: torch.Tensor, shape: tuple[int, int]):
        self.name, self.shape, (rows, columns) = name, shape, shape
        self.raw, self.at = memoryview(stream.cpu().contiguous().numpy()), _HEAD
        if len(self.raw) <= _HEAD or self.raw[0] != _MAGIC or self.raw[1] != _VERSION:
            raise self._error(f"is no version {_VERSION} weight stream; update the package or")
        if rows * columns > _MOST_CODES * len(self.raw) or not rows * columns:
            raise self._error(f"has {len(self.raw)} bytes for {rows} x {columns} codes; check config.json or")
        _, _, flags, grid, base, self.check = struct.unpack_from("<BBBBfI", self.raw)
        count = self._take(1)[0]
        self.digits = list(self._take(count))
        if flags > 3 or not grid or not 0 < base < math.inf or not 0 < count <= _MAX_GROUPS:
            raise self._error(f"has flags {flags}, grid {grid}, base {base}, {count} groups;")
        if not all(1 <= digits <= 3 for digits in self.digits):
            raise self._error(f"has groups of {self.digits} digits;")
        exponents = self._side(rows, np.int8) if flags & 1 else np.zeros(rows, np.int8)
        column_exponents = self._side(columns, np.int8) if flags & 2 else None
        groups = self._side(columns, np.uint8) if count > 1 else np.zeros(columns, np.uint8)
        if groups.max() >= count or (np.bincount(groups, minlength=count) == 0).any():
            raise self._error(f"has columns that belong to none of its {count} groups;")
        self.columns = [np.flatnonzero(groups == i) for i in range(count)]
        self.fields = {
            "base": base,
            "grid": grid,
            "exponents": torch.from_numpy(exponents),
            "column_exponents": None if column_exponents is None else torch.from_numpy(column_exponents),
        }
        self.chunks = self._directory()

    def _error(self, what: str) -> CodecError:
        return CodecError(f"The stream of {self.name} {what} fetch the file again.")

    def _take(self, length: int) -> memoryview:
        if self.at + length > len(self.raw):
            raise self._error("is cut short;")
        self.at += length
        return self.raw[self.at - length : self.at]

    def _side(self, count: int, kind: type) -> np.ndarray:
        (length,) = struct.unpack("<I", self._take(4))
        if length > count:
            raise self._error(f"has {length} bytes for {count} side values;")
        return decode_chunk(self._take(length), count).view(kind).copy()

    def _directory(self) -> list[tuple[int, int, int, bool, memoryview]]:
        """(first row, last row, group, whether it holds third digits, payload) of each chunk."""
        places = [
            (first, last, group, third)
            for first, last in _bands(*self.shape)
            for group, digits in enumerate(self.digits)
            for third in ((False, True) if digits == 3 else (False,))
        ]
        lengths = struct.unpack(f"<{len(places)}I", self._take(4 * len(places)))
        if sum(lengths) != len(self.raw) - self.at:
            raise self._error(f"has {len(self.raw) - self.at} bytes of codes in place of {sum(lengths)};")
        return [(*place, self._take(length)) for place, length in zip(places, lengths)]

    def open(self) -> None:
        """Take memory for the codes: as much as the shape and the digits of the columns ask for."""
        kinds = np.empty(self.shape[1], dtype=np.int64)
        for columns, digits in zip(self.columns, self.digits):
            kinds[columns] = digits
        wide = np.flatnonzero(kinds > 1), np.flatnonzero(kinds > 2)
        count = self.shape[1] + len(wide[0]) + len(wide[1])
        starts = 0, self.shape[1], self.shape[1] + len(wide[0])
        # of the first, second and third digits in the tiles
        self.places = [
            [start + (np.searchsorted(order, columns) if order is not None else columns) for columns in self.columns]
            for start, order in zip(starts, (None, *wide))
        ]
        numbers = torch.from_numpy(wide[0]), torch.from_numpy(wide[1])
        self.weight = TiledWeight(self.shape, empty_tiles(self.shape[0], count), numbers, **self.fields)
        self.items = self.weight.tiles.numpy().view("V32")[:, :, 0]  # 32 bytes move as one
        if count < self.items.shape[1]:
            self.weight.tiles[:, count:] = 0x88

    def verify(self) -> None:
        """Check the checksum and the steps."""
        head = struct.pack("<II", *self.shape) + bytes(self.raw[:8])
        if zlib.crc32(self.raw[_HEAD:], zlib.crc32(head)) != self.check:
            raise self._error(f"has a wrong checksum for a {self.shape[0]} x {self.shape[1]} weight;")
        scale = self.weight.column_scale()
        steps = self.weight.step() * (1 if scale is None else scale.max())
        if not (torch.isfinite(steps).all() and (steps > 0).all()):
            raise self._error("has a step that overflows or vanishes;")

    def submit(self, pool: ThreadPoolExecutor) -> list[Future]:
        """Verify and decode, small chunks together: a task costs as much as some thousand bytes."""
        tasks, batch, size = [pool.submit(self.verify)], [], 0
        for chunk in self.chunks:
            batch.append(chunk)
            size += len(chunk[-1])
            if size >= _TASK_BYTES or chunk is self.chunks[-1]:
                tasks.append(pool.submit(self.fill_all, batch))
                batch, size = [], 0
        return tasks

    def fill_all(self, chunks: list[tuple[int, int, int, bool, memoryview]]) -> None:
        for chunk in chunks:
            self.fill(*chunk)

    def fill(self, first: int, last: int, group: int, third: bool, payload: memoryview) -> None:
        """Decode one chunk to its place in the tiles."""
        columns, whole = len(self.columns[group]), (last - first) // TILE_ROWS
        rest, nibbles = last - first - whole * TILE_ROWS, third or self.digits[group] == 1
        length = 32 if nibbles else TILE_ROWS
        short = (rest + 1) // 2 if nibbles else rest
        data = decode_chunk(payload, columns * (whole * length + short))
        parts = (
            [(first // TILE_ROWS, data[: columns * whole * length].reshape(whole, columns, length))] if whole else []
        )
        if rest:
            last_tile = data[columns * whole * length :].reshape(columns, short)
            parts.append((first // TILE_ROWS + whole, _whole_tile(last_tile, rest, nibbles)[None]))
        for tile, part in parts:
            tiles = self.items[tile : tile + len(part)]
            if nibbles:
                tiles[:, self.places[2 if third else 0][group]] = np.ascontiguousarray(part).view("V32")[:, :, 0]
                continue
            low, high = part[:, :, :32], part[:, :, 32:]
            tiles[:, self.places[0][group]] = (low & 15 | high << 4).view("V32")[:, :, 0]
            tiles[:, self.places[1][group]] = (low >> 4 | high & 240).view("V32")[:, :, 0]


def _whole_tile(data: np.ndarray, rows: int, nibbles: bool) -> np.ndarray:
    """The last tile `[columns, ...]` filled up with code 0: nibbles to `[columns, 32]`, bytes to `[columns, 64]`."""
    if nibbles:
        data = np.concatenate([data & 15, data >> 4], 1)[:, :rows]
    full = np.full((len(data), TILE_ROWS), 8 if nibbles else 136, dtype=np.uint8)
    full[:, :rows] = data
    return full[:, :32] | full[:, 32:] << 4 if nibbles else full


def decode_weights(
    streams: Iterable[tuple[str, torch.Tensor, tuple[int, int]]], threads: int | None = None
) -> Iterator[tuple[int, TiledWeight]]:
    """Inverse of [`encode_weight`] on untrusted bytes, several streams at a time.

    Args:
        streams (iterable of `(name, uint8 tensor, (rows, columns))`): the shape is the model's, never the file's. A
            stream is taken shortly before its turn and let go of when it is done.
        threads (`int`, *optional*): workers; as many as there are processors by default.

    Yields:
        `(position, weight)` in order.

    Raises:
        [`CodecError`]: anything that is not exactly one valid stream of that shape.
    """
    workers, held = threads or os.cpu_count() or 1, 0
    running: deque[tuple[int, _Stream, list[Future]]] = deque()
    pool = ThreadPoolExecutor(workers)

    def finished() -> tuple[int, TiledWeight]:
        nonlocal held
        position, stream, tasks = running.popleft()
        for task in tasks:
            task.result()
        held -= len(stream.raw)
        return position, stream.weight

    try:
        for position, item in enumerate(streams):
            stream = _Stream(*item)
            del item
            stream.open()
            running.append((position, stream, stream.submit(pool)))
            held += len(stream.raw)
            while held > workers * _AHEAD:
                yield finished()
        while running:
            yield finished()
    finally:
        pool.shutdown(cancel_futures=True)
