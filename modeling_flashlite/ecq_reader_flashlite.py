"""Reading of weight streams, the untrusted bytes of `ecq_stream_flashlite`, to tiles in memory.

zlib takes most of the time, and releases the interpreter lock. The rest is few operations on a band of a matrix, in
buffers that stay in the cache: bands of several streams are decoded at a time, by as many threads as there are cores.
"""

from __future__ import annotations

import functools
import math
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from .codec_flashlite import CodecError, decode_chunk
from .ecq_stream_flashlite import HEAD, MAGIC, MAX_GROUPS, VERSION, band_rows
from .ecq_weight_flashlite import TiledWeight, share_scales, thin_out
from .tiles_flashlite import TILE_ROWS, empty_tiles

_MOST_CODES = 4096  # in a byte of a stream; deflate reaches 2064
_AHEAD = 1 << 22  # bytes of streams decoded or queued, per worker
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
# first row, last row, and for each chunk its group, whether it holds third digits, and the payload
_Band = tuple[int, int, list[tuple[int, bool, memoryview]]]


class _Stream:
    """A stream with its head read and every length checked against the shape; [`fill`] decodes it chunk by chunk.

    Nothing larger than a side chunk is allocated before [`open`].
    """

    def __init__(self, name: str, stream: torch.Tensor, shape: tuple[int, int]):
        self.name, self.shape, (rows, columns) = name, shape, shape
        self.raw, self.at = memoryview(stream.cpu().contiguous().numpy()), HEAD
        if len(self.raw) <= HEAD or self.raw[0] != MAGIC or self.raw[1] != VERSION:
            raise self._error(f"is no version {VERSION} weight stream; update the package or")
        if rows * columns > _MOST_CODES * len(self.raw) or not rows * columns:
            raise self._error(f"has {len(self.raw)} bytes for {rows} x {columns} codes; check config.json or")
        _, _, flags, grid, base, self.check = struct.unpack_from("<BBBBfI", self.raw)
        count = self._take(1)[0]
        self.digits = list(self._take(count))
        if flags > 3 or not grid or not 0 < base < math.inf or not 0 < count <= MAX_GROUPS:
            raise self._error(f"has flags {flags}, grid {grid}, base {base}, {count} groups;")
        if not all(1 <= digits <= 3 for digits in self.digits):
            raise self._error(f"has groups of {self.digits} digits;")
        exponents = self._side(rows, np.int8) if flags & 1 else np.zeros(rows, np.int8)
        column_exponents = self._side(columns, np.int8) if flags & 2 else None
        groups = self._side(columns, np.uint8) if count > 1 else np.zeros(columns, np.uint8)
        if groups.max() >= count or (np.bincount(groups, minlength=count) == 0).any():
            raise self._error(f"has columns that belong to none of its {count} groups;")
        self.columns = [np.flatnonzero(groups == i) for i in range(count)]
        kinds = np.array(self.digits)[groups]
        self.wide = np.flatnonzero(kinds > 1), np.flatnonzero(kinds > 2)
        self._check_steps(base, grid, exponents, column_exponents)
        self.fields = {
            "base": base,
            "grid": grid,
            "exponents": torch.from_numpy(exponents),
            "column_exponents": None if column_exponents is None else torch.from_numpy(column_exponents),
        }
        self.bands = self._directory()

    def _check_steps(self, base: float, grid: int, exponents: np.ndarray, column_exponents: np.ndarray | None) -> None:
        """Refuse steps, and their products with column scales, that are not positive float32 values."""
        least, most = int(exponents.min()), int(exponents.max())
        if column_exponents is not None:
            most += max(int(column_exponents.max()), 0)
        ends = [base * 2.0 ** (exponent / grid) for exponent in (least, most)]
        if ends[0] < _SMALLEST or ends[1] > _LARGEST:
            raise self._error("has a step that overflows or vanishes;")

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

    def _directory(self) -> list[_Band]:
        """The bands, with their chunks; each chunk has a length in the directory."""
        kinds = [(g, third) for g, digits in enumerate(self.digits) for third in (False, True)[: 1 + (digits == 3)]]
        places = band_rows(*self.shape)
        lengths = struct.unpack(f"<{len(places) * len(kinds)}I", self._take(4 * len(places) * len(kinds)))
        if sum(lengths) != len(self.raw) - self.at:
            raise self._error(f"has {len(self.raw) - self.at} bytes of codes in place of {sum(lengths)};")
        sizes = iter(lengths)
        return [(first, last, [(*kind, self._take(next(sizes))) for kind in kinds]) for first, last in places]

    def open(self, wide: tuple[np.ndarray, np.ndarray], tiles: torch.Tensor) -> None:
        """Take `tiles` for the codes, with room for the digits of the columns `wide`, the own ones among them."""
        self.weight = TiledWeight(self.shape, tiles, tuple(map(torch.from_numpy, wide)), **self.fields)
        self.items = tiles.numpy().view("V32")[:, :, 0]  # 32 bytes move as one
        # column c of tile t comes from item T * before[c] + t * length[c] + number[c] of a decoded band of T tiles
        self.length, self.number = np.zeros((2, self.items.shape[1]), dtype=np.int64)
        self.before, starts, self.parts = self.length.copy(), (0, self.shape[1], self.shape[1] + len(wide[0])), 0
        self.before -= 1
        for columns, digits in zip(self.columns, self.digits):
            for digit in range(digits):
                places = starts[digit] + (np.searchsorted(wide[digit - 1], columns) if digit else columns)
                self.before[places], self.length[places] = self.parts, len(columns)
                self.number[places] = np.arange(len(columns))
                self.parts += len(columns)
        self.before[self.before < 0] = self.parts  # columns without digits: an item of zeros follows

    def verify(self) -> None:
        """Check the checksum."""
        head = struct.pack("<II", *self.shape) + bytes(self.raw[:8])
        if zlib.crc32(self.raw[HEAD:], zlib.crc32(head)) != self.check:
            raise self._error(f"has a wrong checksum for a {self.shape[0]} x {self.shape[1]} weight;")

    def submit(self, pool: ThreadPoolExecutor, rooms: _Rooms) -> list[Future]:
        """Verify, and decode band by band."""
        first, *others = self.bands

        def begin():
            self.verify()
            self.fill(*first, rooms)

        return [pool.submit(begin), *(pool.submit(self.fill, *band, rooms) for band in others)]

    def fill(self, first: int, last: int, chunks: list[tuple[int, bool, memoryview]], rooms: _Rooms) -> None:
        """Decode one band to its place in the tiles."""
        whole, rest = divmod(last - first, TILE_ROWS)
        items, at, tail = rooms.take("items", 32 * (whole * self.parts + 1)), 0, []
        for group, third, payload in chunks:
            columns, nibbles = len(self.columns[group]), third or self.digits[group] == 1
            size, short = columns * whole * 32, columns * ((rest + 1) // 2 if nibbles else rest)
            if nibbles and not rest:
                decode_chunk(payload, size, items[at : at + size])
                at += size
                continue
            held = size if nibbles else 2 * size
            data = decode_chunk(payload, held + short, rooms.take("bytes", held + short))
            if nibbles:
                items[at : at + size] = data[:size]
            else:
                _digits(data[:size], data[size:held], items[at : at + size], items[at + size : at + held])
            at += held
            if rest:
                tail.append(_last_tile(data[held:].reshape(columns, -1), rest, nibbles))
        self._move(first // TILE_ROWS, whole, items)
        if rest:
            self._move(first // TILE_ROWS + whole, 1, np.concatenate([*tail, np.empty(32, np.uint8)]))

    def _move(self, tile: int, count: int, items: np.ndarray) -> None:
        """Move the decoded columns of `count` tiles to their places."""
        items[-32:] = 0x88
        sources = np.arange(count)[:, None] * self.length
        sources += self.before * count + self.number
        np.take(items.view("V32"), sources, out=self.items[tile : tile + count], mode="clip")


def _digits(low_rows: np.ndarray, high_rows: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Bytes code + 136 of rows j and j + 32 to nibbles of both rows: first digits and second digits."""
    np.left_shift(high_rows, 4, out=first)
    np.bitwise_and(low_rows, 15, out=second)
    np.bitwise_or(first, second, out=first)
    np.right_shift(low_rows, 4, out=second)
    np.bitwise_or(second, high_rows & 240, out=second)


def _last_tile(data: np.ndarray, rows: int, nibbles: bool) -> np.ndarray:
    """Items of a tile that is not full, filled up with code 0, from the nibbles or bytes `[columns, ...]` stored."""
    if nibbles:
        data = np.concatenate([data & 15, data >> 4], 1)[:, :rows]
    full = np.full((len(data), TILE_ROWS), 8 if nibbles else 136, dtype=np.uint8)
    full[:, :rows] = data
    low, high = np.ascontiguousarray(full[:, :32]).reshape(-1), np.ascontiguousarray(full[:, 32:]).reshape(-1)
    if nibbles:
        return low | high << 4
    digits = np.empty((2, low.size), np.uint8)
    _digits(low, high, *digits)
    return digits.reshape(-1)


class _Rooms(threading.local):
    """Buffers of each worker, used again for every band: what is allocated anew is not in the cache."""

    def __init__(self):
        self.held: dict[str, np.ndarray] = {}

    def take(self, name: str, size: int) -> np.ndarray:
        if name not in self.held or self.held[name].size < size:
            self.held[name] = np.empty(size, np.uint8)
        return self.held[name][:size]


def _open(streams: list[_Stream]) -> list[list[_Stream]]:
    """Take one memory for the tiles of a family, in which its members get each other's wide columns.

    Returns:
        The family, or each stream by itself where they cannot be multiplied together.
    """
    if not share_scales([stream.fields["column_exponents"] for stream in streams]):
        return [family for stream in streams for family in _open([stream])]
    second, third = (functools.reduce(np.union1d, [stream.wide[i] for stream in streams]) for i in range(2))
    counts = [-(-stream.shape[0] // TILE_ROWS) for stream in streams]
    tiles = empty_tiles(TILE_ROWS * sum(counts), streams[0].shape[1] + len(second) + len(third))
    for stream, own in zip(streams, tiles.split(counts)):
        stream.open((second, third), own)
    return [streams]


def decode_weights(
    families: Iterable[list[tuple[str, torch.Tensor, tuple[int, int]]]], threads: int | None = None
) -> Iterator[list[TiledWeight]]:
    """Inverse of [`encode_weight`] on untrusted bytes, several streams at a time.

    Args:
        families (iterable of lists of `(name, uint8 tensor, (rows, columns))`): the shape is the model's, never the
            file's. Weights of one list become neighbours in memory, and have the same columns; with equal column
            scales they get each other's wide columns, so that `ecq_modules_flashlite.join` need not move them.
            A list is taken shortly before its turn and let go of when it is done.
        threads (`int`, *optional*): workers; as many as PyTorch has by default.

    Yields:
        The weights of each list, in order.

    Raises:
        [`CodecError`]: anything that is not exactly one valid stream of that shape.
    """
    workers, held = threads or torch.get_num_threads(), 0
    running: deque[tuple[list[list[_Stream]], list[Future]]] = deque()
    pool, rooms = ThreadPoolExecutor(workers), _Rooms()

    def finished() -> list[TiledWeight]:
        nonlocal held
        groups, tasks = running.popleft()
        for task in tasks:
            task.result()
        held -= sum(len(stream.raw) for group in groups for stream in group)
        return [weight for group in groups for weight in thin_out([stream.weight for stream in group])]

    try:
        for family in families:
            streams = [_Stream(*item) for item in family]
            del family
            running.append((_open(streams), [task for stream in streams for task in stream.submit(pool, rooms)]))
            held += sum(len(stream.raw) for stream in streams)
            while held > workers * _AHEAD:
                yield finished()
        while running:
            yield finished()
    finally:
        pool.shutdown(cancel_futures=True)
