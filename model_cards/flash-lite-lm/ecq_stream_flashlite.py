"""A quantized weight matrix and the byte stream in which it is stored.

A weight matrix `[rows, columns]` is `step[row] * code[row, column]` with integer codes, packed two per byte as in
`codec_flashlite`. A row with outliers may use codes -136..119: such a code is `low + 16 * high` with both parts in
-8..7; `low` lies with the other rows, `high` in a second packed array for the outlier rows alone.

Steps are `base * 2 ** (exponent[row] / grid)`: one float and small integers, so that they cost next to nothing on disk
and the same bytes come back at every save.

Weight stream (little endian), one uint8 tensor under the name of the weight
    ======  =====  ====================================================================================================
    offset  bytes  meaning
    ======  =====  ====================================================================================================
    0       1      magic 0xE9
    1       1      version: 1, codes row by row; 2, in tile order
    2       1      flags: 1 exponents present (else all 0), 2 outlier rows present
    3       1      grid, exponents per octave, 1..255
    4       4      base, float32, positive
    8       4      CRC-32 of bytes 0-7, rows (u32), columns (u32) and the parts below before the last
    12      -      if flag 1: u32 length, side stream of the int8 exponents
                   if flag 2: u32 count R, u32 length, side stream of the u32 row numbers, u32 length, code stream of
                   `high`
    -       -      code stream of `packed`; side and code streams are those of `codec_flashlite`
    ======  =====  ====================================================================================================

Tile order is that of a loaded model's memory, so that nothing has to be reordered: the tiles of `int4_flashlite` as
far as 64 rows fill them, then the remaining rows, row by row. The number of columns must be a multiple of 32. The
encoder prefers it unless its bytes cost more, as where rows of an embedding differ in scale.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .codec_flashlite import (
    CodecError,
    decode_bytes,
    decode_groups,
    encode_bytes,
    encode_many,
    pack_codes,
    unpack_codes,
)
from .int4_flashlite import TILE_ROWS, empty_tiles, tile_codes, untile_codes

_MAGIC, _ROWS, _TILES, _HEAD = 0xE9, 1, 2, 12
_TILED_COST = 1.002  # what tile order may cost, for the time that it saves
GRID = 16


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes -8..7 of any shape to uint8 `[ceil(count / 2)]`."""
    return torch.from_numpy(pack_codes(codes.to(torch.int8).cpu().numpy()))


def unpack(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Inverse of [`pack`]: int8 of the given shape."""
    return torch.from_numpy(unpack_codes(packed.cpu().numpy(), shape[0] * shape[1])).view(shape)


def _whole_tiles(shape: tuple[int, int]) -> int:
    """Rows that fill tiles."""
    return shape[0] // TILE_ROWS * TILE_ROWS


@dataclass
class QuantizedWeight:
    """A quantized matrix as it is searched, stored and loaded.

    Attributes:
        shape (`tuple[int, int]`): rows (output features or vocabulary), columns.
        packed (`torch.Tensor` uint8 `[ceil(rows * columns / 2)]`): codes, or their low parts in outlier rows.
        base (`float`): step of exponent 0, a float32 value.
        exponents (`torch.Tensor` int8 `[rows]`): `step = base * 2 ** (exponents / grid)`.
        grid (`int`): exponents per octave.
        outlier_rows (`torch.Tensor` int64 `[R]` or `None`): rows whose codes reach beyond -8..7.
        outlier_packed (`torch.Tensor` uint8 `[ceil(R * columns / 2)]` or `None`): their high parts.
        tiled (`bool`): whether `packed` is in tile order, not row by row.
    """

    shape: tuple[int, int]
    packed: torch.Tensor
    base: float
    exponents: torch.Tensor
    grid: int = GRID
    outlier_rows: torch.Tensor | None = None
    outlier_packed: torch.Tensor | None = None
    tiled: bool = False

    @classmethod
    def from_codes(cls, codes: torch.Tensor, base: float, exponents: torch.Tensor, grid: int = GRID):
        """Pack integer codes `[rows, columns]` of -136..119; rows that leave -8..7 become outlier rows."""
        codes = codes.to(torch.int16)
        wide = ((codes < -8) | (codes > 7)).any(dim=1).nonzero().flatten()
        low = ((codes + 8) & 15) - 8
        high = pack((codes[wide] - low[wide]) >> 4) if len(wide) else None
        rows = wide.cpu() if len(wide) else None
        return cls(tuple(codes.shape), pack(low), base, exponents.to("cpu", torch.int8), grid, rows, high)

    def codes(self) -> torch.Tensor:
        """Integer codes, int16 `[rows, columns]`."""
        codes = unpack(self.packed_rows(), self.shape).to(torch.int16)
        if self.outlier_rows is not None:
            shape = len(self.outlier_rows), self.shape[1]
            codes[self.outlier_rows] += 16 * unpack(self.outlier_packed, shape).to(torch.int16)
        return codes

    def packed_rows(self) -> torch.Tensor:
        """Packed codes row by row, uint8 `[ceil(rows * columns / 2)]`."""
        if not self.tiled:
            return self.packed
        whole, columns = _whole_tiles(self.shape), self.shape[1]
        tiles = self.packed[: whole * columns // 2].view(-1, columns, TILE_ROWS // 2)
        return torch.cat([untile_codes(tiles, whole, columns), self.packed[tiles.numel() :]])

    def tiles(self, room: torch.Tensor | None = None) -> torch.Tensor:
        """Packed codes as `tile_codes` returns them, in `room` where it is given; `packed` may be its beginning."""
        if not self.tiled:
            return tile_codes(self.packed, *self.shape, room)
        (rows, columns), whole = self.shape, _whole_tiles(self.shape)
        room = empty_tiles(rows, columns) if room is None else room
        if room.data_ptr() != self.packed.data_ptr():
            room.view(-1)[: self.packed.numel()] = self.packed
        if whole < rows:
            rest = room.view(-1)[whole * columns // 2 : self.packed.numel()]
            tile_codes(rest, rows - whole, columns, room[whole // TILE_ROWS :])
        return room

    def step(self) -> torch.Tensor:
        """Steps, float32 `[rows]`."""
        return (self.base * torch.exp2(self.exponents.double() / self.grid)).float()


def _cost(packed: np.ndarray) -> float:
    """Order-0 entropy of all bytes, in bits."""
    counts = np.bincount(packed)
    counts = counts[counts > 0]
    return float((counts * (math.log2(packed.size) - np.log2(counts))).sum())


def stored_codes(weight: QuantizedWeight) -> tuple[np.ndarray, bool]:
    """Packed codes in the order in which the file will hold them, and whether that is tile order."""
    rows = weight.packed_rows().numpy()
    if weight.shape[0] >= TILE_ROWS and weight.shape[1] % 32 == 0:
        whole = _whole_tiles(weight.shape)
        tiles = tile_codes(torch.from_numpy(rows[: whole * weight.shape[1] // 2]), whole, weight.shape[1])
        tiled = np.concatenate([tiles.view(-1).numpy(), rows[tiles.numel() :]])
        if _cost(tiled) <= _TILED_COST * _cost(rows):
            return tiled, True
    return rows, False


def encode_weights(weights: list[QuantizedWeight]) -> list[torch.Tensor]:
    """The stored stream of each weight, uint8 `[bytes]`; many small weights are coded side by side."""
    jobs, versions = [], []
    for weight in weights:
        packed, tiled = stored_codes(weight)
        jobs.append((packed, weight.shape[0] * weight.shape[1]))
        versions.append(_TILES if tiled else _ROWS)
        if weight.outlier_packed is not None:
            jobs.append((weight.outlier_packed.numpy(), len(weight.outlier_rows) * weight.shape[1]))
    coded = iter(encode_many(jobs))
    streams = []
    for weight, version in zip(weights, versions):
        low, parts, flags = next(coded), b"", 0
        exponents = weight.exponents.cpu().numpy().astype(np.int8)
        if exponents.any():
            side = encode_bytes(exponents.view(np.uint8)).tobytes()
            parts, flags = struct.pack("<I", len(side)) + side, 1
        if weight.outlier_packed is not None:
            rows = weight.outlier_rows.cpu().numpy().astype("<u4")
            side, high = encode_bytes(rows.view(np.uint8), planes=4).tobytes(), next(coded).tobytes()
            parts += struct.pack("<II", len(rows), len(side)) + side + struct.pack("<I", len(high)) + high
            flags |= 2
        head = struct.pack("<BBBBf", _MAGIC, version, flags, weight.grid, weight.base)
        check = zlib.crc32(head + struct.pack("<II", *weight.shape) + parts)
        raw = head + struct.pack("<I", check) + parts + low.tobytes()
        streams.append(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    return streams


def _parse(raw: memoryview, shape: tuple[int, int], name: str) -> tuple[dict, list[tuple[memoryview, int]]]:
    """Header fields of a stream and its code streams with their counts; allocates nothing larger than a side array."""
    rows, columns = shape
    at = _HEAD

    def take(length: int) -> memoryview:
        nonlocal at
        if at + length > len(raw):
            raise CodecError(f"The stream of {name} is cut short; fetch the file again.")
        at += length
        return raw[at - length : at]

    if len(raw) < _HEAD or raw[0] != _MAGIC or raw[1] not in (_ROWS, _TILES):
        raise CodecError(
            f"{name} is no version {_ROWS} or {_TILES} weight stream; update the package or fetch the file again."
        )
    _, _, flags, grid, base, check = struct.unpack_from("<BBBBfI", raw)
    if raw[1] == _TILES and columns % 32:
        raise CodecError(f"The stream of {name} has tiles, but {columns} columns; fetch the file again.")
    if flags > 3 or not grid or not 0 < base < math.inf:
        raise CodecError(f"The stream of {name} has flags {flags}, grid {grid}, base {base}; fetch the file again.")
    fields = {"base": base, "grid": grid, "exponents": torch.zeros(rows, dtype=torch.int8)}
    fields["tiled"] = raw[1] == _TILES
    codes = []
    if flags & 1:
        side = take(struct.unpack("<I", take(4))[0])
        fields["exponents"] = torch.from_numpy(decode_bytes(side, rows).view(np.int8))
    if flags & 2:
        outliers, length = struct.unpack("<II", take(8))
        if not 0 < outliers <= rows:
            raise CodecError(f"The stream of {name} has {outliers} outlier rows of {rows}; fetch the file again.")
        numbers = decode_bytes(take(length), 4 * outliers).view("<u4").astype(np.int64)
        if numbers[-1] >= rows or (np.diff(numbers) <= 0).any():
            raise CodecError(f"The outlier rows of {name} are not increasing below {rows}; fetch the file again.")
        fields["outlier_rows"] = torch.from_numpy(numbers)
        codes.append((take(struct.unpack("<I", take(4))[0]), outliers * columns))
    if zlib.crc32(bytes(raw[:8]) + struct.pack("<II", rows, columns) + bytes(raw[_HEAD:at])) != check:
        raise CodecError(f"The checksum of {name} is wrong for a {rows} x {columns} weight; fetch the file again.")
    return fields, [(raw[at:], rows * columns), *codes]


def decode_weights(
    streams: Iterable[tuple[str, torch.Tensor, tuple[int, int], torch.Tensor | None]],
) -> Iterator[tuple[int, QuantizedWeight]]:
    """Inverse of [`encode_weights`] on untrusted bytes.

    Args:
        streams (iterable of `(name, uint8 tensor, (rows, columns), room)`): the shape is the model's, never the
            file's; room is a contiguous uint8 tensor on the CPU of at least the packed size, at the beginning of which
            the packed codes shall lie, or `None`. Taken shortly before its turn, let go of when it is done.

    Yields:
        `(position, weight)` as each is done, not in order.

    Raises:
        [`CodecError`]: anything that is not exactly one valid stream of that shape.
    """
    parsed: dict[int, tuple[str, tuple[int, int], dict]] = {}

    def groups():
        for position, (name, stream, shape, room) in enumerate(streams):
            fields, codes = _parse(memoryview(stream.cpu().contiguous().numpy()), shape, name)
            parsed[position] = name, shape, fields
            rooms = [None if room is None else room.view(-1)[: (shape[0] * shape[1] + 1) // 2].numpy(), None]
            yield [(*item, room) for item, room in zip(codes, rooms)]

    for position, decoded in decode_groups(groups()):
        name, shape, fields = parsed.pop(position)
        packed, *high = (torch.from_numpy(codes) for codes in decoded)
        weight = QuantizedWeight(shape, packed, **fields, outlier_packed=high[0] if high else None)
        if not torch.isfinite(weight.step()).all():
            raise CodecError(f"{name} has a step that overflows; fetch the file again.")
        yield position, weight
