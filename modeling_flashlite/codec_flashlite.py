"""Deflate-compatible Huffman coder: bytes to one raw deflate block and back, lossless and bounded.

The encoder writes one dynamic block (RFC 1951) of optimal length-limited codes, literals only: deterministic on every
machine, and 0.6% above the entropy of int4 pairs. zlib's own encoder starts a new table every 32768 symbols and takes
1.0%. zlib's C decoder reads it at full speed, releases the interpreter lock and is part of every Python.

A *chunk* of n bytes is stored raw if its coded form would not be smaller. The stored length tells the form: n is raw,
less is deflate. The caller knows n, which bounds decoding: it never produces more than n + 1 bytes.
"""

from __future__ import annotations

import heapq
import zlib

import numpy as np

_PIECE = 1 << 15  # bytes given to zlib at a time, so that its output stays in the cache
_HEADER_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)


class CodecError(ValueError):
    """The bytes are not a valid stream for the array they should hold."""


def _package_merge(weights: np.ndarray, limit: int) -> np.ndarray:
    """Optimal prefix code lengths of at most `limit` bits for at least two positive weights."""
    members = np.eye(len(weights), dtype=np.int64)
    level_weights, level_members = weights, members
    for _ in range(limit - 1):
        order = np.argsort(level_weights, kind="stable")
        order = order[: len(order) // 2 * 2]
        paired_weights = level_weights[order].reshape(-1, 2).sum(1)
        paired_members = level_members[order[0::2]] + level_members[order[1::2]]
        level_weights = np.concatenate([weights, paired_weights])
        level_members = np.concatenate([members, paired_members])
    order = np.argsort(level_weights, kind="stable")[: 2 * len(weights) - 2]
    return level_members[order].sum(0)


def code_lengths(counts: np.ndarray, limit: int) -> np.ndarray:
    """Optimal prefix code lengths of at most `limit` bits; 0 for symbols with count 0."""
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), dtype=np.int64)
    if len(used) < 2:
        lengths[used] = 1
        return lengths
    heap = [(int(counts[symbol]), i) for i, symbol in enumerate(used)]
    heapq.heapify(heap)
    parents = [0] * (2 * len(used) - 1)
    for node in range(len(used), len(parents)):
        (first, left), (second, right) = heapq.heappop(heap), heapq.heappop(heap)
        parents[left] = parents[right] = node
        heapq.heappush(heap, (first + second, node))
    depths = [0] * len(parents)
    for node in range(len(parents) - 2, -1, -1):
        depths[node] = depths[parents[node]] + 1
    lengths[used] = depths[: len(used)]
    if lengths.max() > limit:
        lengths[used] = _package_merge(counts[used].astype(np.int64), limit)
    return lengths


def _canonical_codes(lengths: np.ndarray) -> list[int]:
    """Canonical Huffman codes (RFC 1951, 3.2.2), bit-reversed so that they can be written low bit first."""
    codes, code = [0] * len(lengths), 0
    for bits in range(1, int(lengths.max()) + 1):
        for symbol in np.flatnonzero(lengths == bits):
            codes[symbol] = int(format(code, f"0{bits}b")[::-1], 2)
            code += 1
        code <<= 1
    return codes


def _run_lengths(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Code lengths as deflate's (symbol, extra value, extra bits): 16 repeats, 17 and 18 are runs of zeros."""
    out, i, values = [], 0, lengths.tolist()
    while i < len(values):
        value, run = values[i], 1
        while i + run < len(values) and values[i + run] == value:
            run += 1
        i += run
        if value:
            out.append((value, 0, 0))
            run -= 1
        while run:
            if value == 0 and run >= 11:
                take = min(run, 138)
                out.append((18, take - 11, 7))
            elif value == 0 and run >= 3:
                take = run
                out.append((17, take - 3, 3))
            elif value and run >= 3:
                take = min(run, 6)
                out.append((16, take - 3, 2))
            else:
                take = 1
                out.append((value, 0, 0))
            run -= take
    return out


def _block_header(lengths: np.ndarray) -> tuple[int, int]:
    """Header of a final dynamic block without distance codes, as (bits, number of bits)."""
    runs = _run_lengths(np.append(lengths, 0))
    meta_lengths = code_lengths(np.bincount([r[0] for r in runs], minlength=19), 7)
    meta_codes = _canonical_codes(meta_lengths)
    last = max(i for i, symbol in enumerate(_HEADER_ORDER) if meta_lengths[symbol] or i == 3)
    fields = [(1, 1), (2, 2), (0, 5), (0, 5), (last - 3, 4)]
    fields += [(int(meta_lengths[symbol]), 3) for symbol in _HEADER_ORDER[: last + 1]]
    for symbol, extra, extra_bits in runs:
        fields += [(meta_codes[symbol], int(meta_lengths[symbol])), (extra, extra_bits)]
    value = position = 0
    for bits, width in fields:
        value |= bits << position
        position += width
    return value, position


class Huffman:
    """A literal-only deflate block for bytes with a given histogram; its size is known before anything is written."""

    def __init__(self, histogram: np.ndarray):
        self.lengths = code_lengths(np.append(histogram, 1), 15)
        self.header, self.header_bits = _block_header(self.lengths)
        body = int((histogram * self.lengths[:256]).sum() + self.lengths[256])
        self.size = (self.header_bits + body + 7) // 8

    def encode(self, data: np.ndarray) -> bytes:
        """The block for uint8 `data`, whose histogram must be the one given."""
        codes = np.array(_canonical_codes(self.lengths), dtype=np.uint64)
        bits = self.lengths.astype(np.uint64)
        symbols = np.full(-(-(data.size + 1) // 4) * 4, 257, dtype=np.int64)
        symbols[: data.size] = data
        symbols[data.size] = 256
        value, width = np.append(codes, np.uint64(0))[symbols], np.append(bits, np.uint64(0))[symbols]
        for _ in range(2):  # four codes of at most 15 bits share one 64-bit value
            value = value[0::2] | (value[1::2] << width[0::2])
            width = width[0::2] + width[1::2]
        start = np.cumsum(width) - width + np.uint64(self.header_bits)
        word, shift = (start >> np.uint64(6)).astype(np.int64), start & np.uint64(63)
        first = np.flatnonzero(np.diff(word, prepend=-1))
        words = np.zeros(int(word[-1]) + 2, dtype="<u8")
        words[word[first]] = np.bitwise_or.reduceat(value << shift, first)
        words[word[first] + 1] |= np.bitwise_or.reduceat((value >> np.uint64(1)) >> (np.uint64(63) - shift), first)
        out = words.view(np.uint8)
        head = np.frombuffer(self.header.to_bytes((self.header_bits + 7) // 8, "little"), dtype=np.uint8)
        out[: head.size] |= head
        return out[: self.size].tobytes()


def chunk_bytes(histogram: np.ndarray) -> int:
    """Bytes that [`encode_chunk`] returns for data with this histogram `[256]`."""
    return min(Huffman(histogram).size, int(histogram.sum()))


def encode_chunk(data: np.ndarray) -> bytes:
    """Encode uint8 data of any shape, or return it raw if that is not larger."""
    data = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1)
    if not data.size:
        return b""
    huffman = Huffman(np.bincount(data, minlength=256))
    return huffman.encode(data) if huffman.size < data.size else data.tobytes()


def decode_chunk(payload, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """Inverse of [`encode_chunk`]: uint8 `[size]`, in `out` if given; raises [`CodecError`] on anything wrong."""
    payload = memoryview(payload).cast("B")
    if len(payload) > size or (size and not len(payload)):
        raise CodecError(f"A chunk of {len(payload)} bytes cannot hold {size}; fetch the file again.")
    if out is None:
        out = np.empty(size, dtype=np.uint8)
    if len(payload) == size:
        out[:] = np.frombuffer(payload, np.uint8)
    else:
        _inflate(payload, out)
    return out


def _inflate(payload: memoryview, out: np.ndarray) -> None:
    """Inflate to exactly the bytes of `out`, piece by piece, never producing more than one extra byte."""
    inflater, done, ok = zlib.decompressobj(-15), 0, True
    try:
        for at in range(0, len(payload), _PIECE):
            data = inflater.decompress(payload[at : at + _PIECE], out.size - done + 1)
            ok = len(data) <= out.size - done
            if not ok:
                break
            out[done : done + len(data)] = np.frombuffer(data, np.uint8)
            done += len(data)
    except zlib.error as error:
        raise CodecError(f"Deflate payload is damaged ({error}); fetch the file again.") from None
    if not ok or done != out.size or not inflater.eof or inflater.unused_data:
        raise CodecError(f"Deflate payload does not hold exactly {out.size} bytes; fetch the file again.")
