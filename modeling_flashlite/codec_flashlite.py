"""Entropy coder of Flash-Lite: int4 codes and small side arrays to bytes and back, exactly.

It needs the standard library and numpy only, decodes untrusted bytes safely, and writes the same bytes on every machine
(the Huffman coder below is its own; only the *decoder* is zlib's).

Packed codes
    A code q in -8..7 is stored as the nibble q + 8; byte i holds weight 2i in its low and weight 2i + 1 in its high
    nibble. An odd count is padded with code 0 (nibble 8). Packing before coding matters: Huffman on single nibbles loses
    3.4% against the entropy, on pairs about 0.6%.

Code stream, version 1 (all integers little endian)
    ======  =====  ==========================================================================================
    offset  bytes  meaning
    ======  =====  ==========================================================================================
    0       1      magic 0xEC
    1       1      version, 1
    2       1      log2 of the weights in a chunk, 12..22 (the last chunk is what remains)
    3       1      reserved, 0
    4       4      CRC-32 of: bytes 0-3, count as u64, the directory, then one u32 per chunk, the CRC-32 of its
                   packed bytes
    8       4 n    directory, one u32 for each of n = ceil(count / chunk) chunks: codec in the top 8 bits,
                   length of the payload in the low 24
    8+4n    -      payloads, one after the other, nothing behind them
    ======  =====  ==========================================================================================

Payload by codec
    0 raw      the packed bytes.
    1 deflate  one raw deflate stream (RFC 1951, no wrapper): a single final block of dynamic Huffman codes, literals only.
    2 rans     256-symbol range ANS over the packed bytes in independent lanes; byte i is symbol i // lanes of lane
               i % lanes, and the last symbols of the last lanes, if any, are padding.
               16 bytes  nibble j has probability proportional to 2**(-byte_j / 16); 255: it does not occur
               u16       lanes L, with at most 8192 symbols in a lane
               L x u16   words in each lane
               L x u32   state of each lane, at least 2**16
               words     u16, lane after lane, in reading order
               A symbol's frequency (of 2**15) is the product of its nibbles' probabilities, see `_pair_frequencies`.
               Decoding a symbol: slot = x mod 2**15, x = freq * (x >> 15) + slot - start; if x < 2**16, x = x * 2**16 +
               the next word. A lane must end in state 2**16 with all of its words read.

Side stream (`encode_bytes`), version 1
    u8 version 1, u8 plane count P, u32 CRC-32 of the decoded bytes, then for each plane u8 codec (0 or 1 above), u32 length,
    payload. Plane p holds bytes p, p + P, p + 2P, ... (P = 2 splits bfloat16 into its low and high bytes).

What a decoder checks before it trusts anything: lengths against the caller's count before the output is allocated, a bound
on what inflate may produce, exact length, end of stream, nothing unused, lane end states, checksum. Work and memory are
bounded by the count, so it cannot hang. Every failure is a `CodecError`.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np


RAW, DEFLATE, RANS = 0, 1, 2
_MAGIC, _VERSION = 0xEC, 1
_LOG2_CHUNK, _MIN_LOG2_CHUNK = 22, 12
_PROB_BITS = 15
_STATE_LOW = 1 << 16
_LANE_SYMBOLS = 4096  # aimed at by the encoder; 48 bits a lane make 0.2% at 2.5 bits per weight
_MAX_LANE_SYMBOLS = 8192  # what a decoder accepts; bounds its steps
_RANS_HEAD = 18
_BIG_CHUNK = 1 << 17  # packed bytes
_RANS_MARGINS = (0.004, 0.0125)  # inflate is faster, so rANS has to save this share of a small and of a big chunk


class CodecError(ValueError):
    """The bytes are not a valid stream for the array they should hold."""


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """Pack int4 codes, two per byte.

    Args:
        codes (`np.ndarray` of any shape, integer values -8..7): flattened in C order.

    Returns:
        `np.ndarray` uint8 `[ceil(count / 2)]`.
    """
    flat = np.ascontiguousarray(codes, dtype=np.int8).reshape(-1)
    if flat.size and (flat.min() < -8 or flat.max() > 7):
        raise ValueError(f"Codes must lie in -8..7, but they span {flat.min()}..{flat.max()}; clamp them first.")
    nibbles = (flat + 8).view(np.uint8)
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(8))
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_codes(packed: np.ndarray, count: int) -> np.ndarray:
    """Inverse of [`pack_codes`]: uint8 `[ceil(count / 2)]` to int8 `[count]`."""
    packed = np.asarray(packed, dtype=np.uint8).reshape(-1)
    if packed.size != (count + 1) // 2:
        raise ValueError(f"{count} codes need {(count + 1) // 2} packed bytes, got {packed.size}.")
    codes = np.empty(2 * packed.size, dtype=np.int8)
    codes[0::2] = packed & 15
    codes[1::2] = packed >> 4
    codes -= 8
    return codes[:count]


def entropy_bits(codes: np.ndarray) -> float:
    """Empirical order-0 entropy of integer codes -8..7, in bits per weight."""
    counts = np.bincount(np.asarray(codes, dtype=np.int64).reshape(-1) + 8, minlength=16)
    p = counts[counts > 0] / max(1, counts.sum())
    return float(-(p * np.log2(p)).sum())


# Huffman in deflate's clothes. zlib starts a new table every 32k symbols; one table per chunk, and code lengths that do
# not depend on the zlib at hand, are what an encoder of our own buys.


def _code_lengths(counts: np.ndarray, limit: int) -> np.ndarray:
    """Optimal prefix code lengths of at most `limit` bits, by package-merge; 0 for symbols with count 0."""
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), dtype=np.int64)
    if len(used) < 2:
        lengths[used] = 1
        return lengths
    weights, members = counts[used].astype(np.int64), np.eye(len(used), dtype=np.int64)
    level_weights, level_members = weights, members
    for _ in range(limit - 1):
        order = np.argsort(level_weights, kind="stable")
        order = order[: len(order) // 2 * 2]
        paired_weights = level_weights[order].reshape(-1, 2).sum(1)
        paired_members = level_members[order[0::2]] + level_members[order[1::2]]
        level_weights = np.concatenate([weights, paired_weights])
        level_members = np.concatenate([members, paired_members])
    order = np.argsort(level_weights, kind="stable")[: 2 * len(used) - 2]
    lengths[used] = level_members[order].sum(0)
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
    out, i, values = [], 0, [int(n) for n in lengths]
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
    meta_lengths = _code_lengths(np.bincount([r[0] for r in runs], minlength=19), 7)
    meta_codes = _canonical_codes(meta_lengths)
    order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15]
    last = max(i for i, symbol in enumerate(order) if meta_lengths[symbol] or i == 3)
    fields = [(1, 1), (2, 2), (0, 5), (0, 5), (last - 3, 4)]
    fields += [(int(meta_lengths[symbol]), 3) for symbol in order[: last + 1]]
    for symbol, extra, extra_bits in runs:
        fields += [(meta_codes[symbol], int(meta_lengths[symbol])), (extra, extra_bits)]
    value = position = 0
    for bits, width in fields:
        value |= bits << position
        position += width
    return value, position


class _Huffman:
    """One literal-only deflate block for bytes with the given histogram; knows its size before it writes anything."""

    def __init__(self, histogram: np.ndarray):
        self.lengths = _code_lengths(np.append(histogram, 1), 15)
        self.header, self.header_bits = _block_header(self.lengths)
        body = int((histogram * self.lengths[:256]).sum() + self.lengths[256])
        self.size = (self.header_bits + body + 7) // 8

    def encode(self, data: np.ndarray) -> bytes:
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


def _inflate(payload: memoryview, size: int) -> bytes:
    """Inflate exactly `size` bytes, never producing more than one byte beyond them."""
    inflater = zlib.decompressobj(-15)
    try:
        data = inflater.decompress(payload, size + 1)
    except zlib.error as error:
        raise CodecError(f"Deflate payload is damaged ({error}); fetch the file again.") from None
    if len(data) != size or not inflater.eof or inflater.unused_data or inflater.unconsumed_tail:
        raise CodecError(f"Deflate payload does not hold exactly {size} bytes; fetch the file again.")
    return data


# rANS: many short independent lanes, decoded side by side, across chunks and tensors, one numpy step per symbol.


def _nibble_levels(histogram: np.ndarray) -> np.ndarray:
    """16 bytes of -16 log2(probability) from the 256-bin histogram of packed bytes; 255 where a nibble never occurs."""
    table = histogram.reshape(16, 16)
    counts = table.sum(0) + table.sum(1)
    levels = np.full(16, 255, dtype=np.uint8)
    used = counts > 0
    levels[used] = np.clip(np.rint(-16 * np.log2(counts[used] / counts.sum())), 0, 254)
    return levels


def _pair_frequencies(levels: np.ndarray) -> np.ndarray:
    """Frequencies of the 256 byte values, summing to 2**15, at least 1 for every pair of nibbles that occur; integers only."""
    mantissa = np.array([math.floor((1 << 24) * 2 ** (-j / 16) + 0.5) for j in range(16)], dtype=np.int64)
    levels = levels.astype(np.int64)
    p = np.where(levels < 255, np.maximum(mantissa[levels % 16] >> (levels // 16), 1), 0)
    if not p.any():
        raise CodecError("The rANS table has no symbol; fetch the file again.")
    p = np.where(p > 0, np.maximum((p << 24) // p.sum(), 1), 0)
    product = np.outer(p, p).reshape(-1)
    total = 1 << _PROB_BITS
    frequencies = np.where(product > 0, np.maximum((product + (1 << 32)) >> (48 - _PROB_BITS), 1), 0)
    frequencies[np.argmax(frequencies)] += total - frequencies.sum()
    return frequencies


def _lane_shape(symbols: int) -> tuple[int, int]:
    """(lanes, symbols in a lane) that the encoder chooses for a chunk."""
    lanes = max(1, round(symbols / _LANE_SYMBOLS))
    return lanes, -(-symbols // lanes)


class _Rans:
    """rANS plan of one chunk: table, lanes and expected size."""

    def __init__(self, histogram: np.ndarray):
        self.levels = _nibble_levels(histogram)
        self.frequencies = _pair_frequencies(self.levels)
        self.lanes, self.steps = _lane_shape(int(histogram.sum()))
        used = histogram > 0
        bits = (histogram[used] * (_PROB_BITS - np.log2(self.frequencies[used]))).sum()
        self.size = _RANS_HEAD + 5 * self.lanes + math.ceil(bits / 8)


def _rans_encode(jobs: Sequence[tuple[np.ndarray, _Rans]]) -> list[bytes]:
    """Encode chunks (packed bytes, plan) side by side; the payload of each."""
    steps = max(plan.steps for _, plan in jobs)
    edges = np.cumsum([0] + [plan.lanes for _, plan in jobs])
    lanes = int(edges[-1])
    symbols = np.full((steps, lanes), -1, dtype=np.int32)  # -1: this lane is shorter
    for i, (data, plan) in enumerate(jobs):
        block = np.full(plan.steps * plan.lanes, int(np.argmax(plan.frequencies)), dtype=np.int32)
        block[: data.size] = data
        symbols[: plan.steps, edges[i] : edges[i + 1]] = block.reshape(plan.steps, plan.lanes) + 256 * i
    frequency = np.concatenate([plan.frequencies for _, plan in jobs])
    start = np.concatenate([np.cumsum(plan.frequencies) - plan.frequencies for _, plan in jobs])
    state = np.full(lanes, _STATE_LOW, dtype=np.int64)
    words = np.zeros((lanes, steps), dtype="<u2")
    free = np.full(lanes, steps, dtype=np.int64)  # words are written backwards, so they lie in reading order
    for row in symbols[::-1]:
        live = np.flatnonzero(row >= 0)
        f, x = frequency[row[live]], state[live]
        full = np.flatnonzero(x >= f << (32 - _PROB_BITS))
        at = live[full]
        free[at] -= 1
        words[at, free[at]] = x[full] & 0xFFFF
        x[full] >>= 16
        high, low = np.divmod(x, f)
        state[live] = (high << _PROB_BITS) + low + start[row[live]]
    kept = np.arange(steps) >= free[:, None]
    payloads = []
    for i, (_, plan) in enumerate(jobs):
        own = slice(edges[i], edges[i + 1])
        head = plan.levels.tobytes() + struct.pack("<H", plan.lanes) + (steps - free[own]).astype("<u2").tobytes()
        payloads.append(head + state[own].astype("<u4").tobytes() + words[own][kept[own]].tobytes())
    return payloads


class _Lanes:
    """Parsed and length-checked rANS payload of one chunk of `size` symbols."""

    def __init__(self, payload: memoryview, size: int):
        if len(payload) < _RANS_HEAD:
            raise CodecError(f"rANS payload of {len(payload)} bytes is shorter than its header; fetch the file again.")
        self.size, (self.lanes,) = size, struct.unpack_from("<H", payload, 16)
        words_at = _RANS_HEAD + 6 * self.lanes
        if not 1 <= self.lanes <= size or len(payload) < words_at:
            raise CodecError(f"rANS payload has {self.lanes} lanes for {size} symbols; fetch the file again.")
        self.steps = -(-size // self.lanes)
        self.words_per_lane = np.frombuffer(payload, "<u2", self.lanes, _RANS_HEAD).astype(np.int64)
        self.states = np.frombuffer(payload, "<u4", self.lanes, _RANS_HEAD + 2 * self.lanes).astype(np.int64)
        count = int(self.words_per_lane.sum())
        if self.steps > _MAX_LANE_SYMBOLS or len(payload) != words_at + 2 * count or self.states.min() < _STATE_LOW:
            raise CodecError("rANS payload contradicts its own lengths; fetch the file again.")
        self.words = np.frombuffer(payload, "<u2", count, words_at)
        self.levels = np.frombuffer(payload, np.uint8, 16)

    def table(self) -> np.ndarray:
        """Symbol, frequency and offset in one int64 for each of the 2**15 slots."""
        frequencies = _pair_frequencies(self.levels)
        start = np.cumsum(frequencies) - frequencies
        entry = (np.arange(256, dtype=np.int64) << 48) | (frequencies << 24)
        return np.repeat(entry - start, frequencies) + np.arange(1 << _PROB_BITS)


def _rans_decode(jobs: Sequence[_Lanes]) -> list[np.ndarray]:
    """Decode chunks side by side. `jobs` are sorted by falling `steps`; the packed bytes of each come back."""
    lane_counts = [job.lanes for job in jobs]
    edges = np.cumsum([0] + lane_counts)
    tables = np.concatenate([job.table() for job in jobs])
    base = np.repeat(np.arange(len(jobs), dtype=np.int64) << _PROB_BITS, lane_counts)
    words = np.concatenate([job.words for job in jobs] + [np.zeros(1, "<u2")]).astype(np.int64)
    counts = np.concatenate([job.words_per_lane for job in jobs])
    end = np.cumsum(counts)
    read = end - counts
    state = np.concatenate([job.states for job in jobs])
    symbols = np.empty((jobs[0].steps, len(state)), dtype=np.uint8)
    mask = (1 << _PROB_BITS) - 1
    ends_at = np.array([job.steps for job in jobs])
    for step in range(jobs[0].steps):
        live = int(edges[np.count_nonzero(ends_at > step)])
        x = state[:live]
        slot = x & mask
        slot += base[:live]
        entry = tables.take(slot)
        np.right_shift(entry, 48, out=symbols[step, :live], casting="unsafe")
        x >>= _PROB_BITS
        x *= (entry >> 24) & 0xFFFFFF
        entry &= 0xFFFFFF
        x += entry
        low = np.flatnonzero(x < _STATE_LOW)
        if low.size:
            at = read[low]
            read[low] = at + 1
            x[low] = (x[low] << 16) | words.take(at, mode="clip")  # a damaged lane may overrun; found out below
    if (read != end).any() or (state != _STATE_LOW).any():
        raise CodecError("A rANS lane does not end where it should; fetch the file again.")
    return [symbols[: job.steps, edges[i] : edges[i + 1]].reshape(-1)[: job.size] for i, job in enumerate(jobs)]


def _rans_batches(jobs: list, limit: int = 64) -> list[list]:
    """Group (lanes, ...) jobs, sorted by falling steps, so that unequal lanes waste at most as much as they hold."""
    batches: list[list] = []
    lanes = symbols = 0
    for job in sorted(jobs, key=lambda j: -j[0].steps):
        lanes, symbols = lanes + job[0].lanes, symbols + job[0].lanes * job[0].steps
        if batches and len(batches[-1]) < limit and batches[-1][0][0].steps * lanes <= 2 * symbols + (1 << 16):
            batches[-1].append(job)
        else:
            batches.append([job])
            lanes, symbols = job[0].lanes, job[0].lanes * job[0].steps
    return batches


# Streams


def _plan(chunk: np.ndarray) -> tuple[int, object, int]:
    """(codec, its plan, size in bytes) for the packed bytes of one chunk."""
    histogram = np.bincount(chunk, minlength=256)
    huffman, rans = _Huffman(histogram), _Rans(histogram)
    codec, plan, size = RAW, None, chunk.size
    if huffman.size < size:
        codec, plan, size = DEFLATE, huffman, huffman.size
    if rans.size < size * (1 - _RANS_MARGINS[chunk.size >= _BIG_CHUNK]):
        codec, plan, size = RANS, rans, rans.size
    return codec, plan, size


def _chunks(packed: np.ndarray, count: int) -> list[np.ndarray]:
    packed = np.ascontiguousarray(packed, dtype=np.uint8).reshape(-1)
    if packed.size != (count + 1) // 2:
        raise ValueError(f"{count} codes need {(count + 1) // 2} packed bytes, got {packed.size}.")
    step = 1 << (_LOG2_CHUNK - 1)
    return [packed[i : i + step] for i in range(0, packed.size, step)]


def coded_size(packed: np.ndarray, count: int) -> int:
    """Bytes that [`encode_codes`] will need, without encoding (rANS within a few bytes, else exact)."""
    chunks = _chunks(packed, count)
    return 8 + sum(4 + _plan(chunk)[2] for chunk in chunks)


def encode_many(arrays: Sequence[tuple[np.ndarray, int]]) -> list[np.ndarray]:
    """Encode several packed code arrays; the small ones share their work.

    Args:
        arrays (sequence of `(packed, count)`): uint8 `[ceil(count / 2)]` of [`pack_codes`] and the number of codes.

    Returns:
        list of `np.ndarray` uint8, one stream each; bytes depend on the codes only.
    """
    split = [_chunks(packed, count) for packed, count in arrays]
    payloads: dict[tuple[int, int], tuple[int, bytes]] = {}
    rans_jobs = []
    for i, chunks in enumerate(split):
        for j, chunk in enumerate(chunks):
            codec, plan, _ = _plan(chunk)
            if codec == RANS:
                rans_jobs.append((plan, (i, j), chunk))
            else:
                payloads[i, j] = codec, chunk.tobytes() if plan is None else plan.encode(chunk)
    for batch in _rans_batches(rans_jobs):
        coded = _rans_encode([(chunk, plan) for plan, _, chunk in batch])
        payloads.update({key: (RANS, payload) for (_, key, _), payload in zip(batch, coded)})
    streams = []
    for i, ((_, count), chunks) in enumerate(zip(arrays, split)):
        coded = [payloads[i, j] for j in range(len(chunks))]
        directory = b"".join(struct.pack("<I", codec << 24 | len(payload)) for codec, payload in coded)
        head = struct.pack("<BBBB", _MAGIC, _VERSION, _LOG2_CHUNK, 0)
        check = _checksum(head, count, directory, [zlib.crc32(chunk) for chunk in chunks])
        stream = head + struct.pack("<I", check) + directory + b"".join(payload for _, payload in coded)
        streams.append(np.frombuffer(stream, dtype=np.uint8))
    return streams


def encode_codes(packed: np.ndarray, count: int) -> np.ndarray:
    """Encode one packed code array, see [`encode_many`]."""
    return encode_many([(packed, count)])[0]


def _checksum(head: bytes, count: int, directory: bytes, crcs: Sequence[int]) -> int:
    return zlib.crc32(head + struct.pack("<Q", count) + directory + struct.pack(f"<{len(crcs)}I", *crcs))


class _Stream:
    """A code stream with its directory read and every length checked against `count`; nothing decoded yet."""

    def __init__(self, stream, count: int):
        view = (
            memoryview(stream).cast("B")
            if not isinstance(stream, np.ndarray)
            else memoryview(np.ascontiguousarray(stream, dtype=np.uint8).reshape(-1))
        )
        if count < 0 or len(view) < 8:
            raise CodecError(f"A code stream has at least 8 bytes, got {len(view)}; fetch the file again.")
        self.head, (magic, version, log2_chunk, reserved) = bytes(view[:4]), view[:4]
        if magic != _MAGIC or version != _VERSION or reserved:
            raise CodecError(
                f"Not a version {_VERSION} code stream (starts with {self.head.hex()}); update the package."
            )
        if not _MIN_LOG2_CHUNK <= log2_chunk <= _LOG2_CHUNK:
            raise CodecError(f"Chunks of 2**{log2_chunk} weights are outside 2**12..2**22; fetch the file again.")
        self.count, self.check = count, struct.unpack_from("<I", view, 4)[0]
        chunks = -(-count // (1 << log2_chunk))
        at = 8 + 4 * chunks
        if len(view) < at:
            raise CodecError(f"The stream ends inside the directory of its {chunks} chunks; fetch the file again.")
        self.directory = bytes(view[8:at])
        self.parts: list[tuple[int, memoryview, int, int]] = []  # codec, payload, first byte, bytes
        size, step = (count + 1) // 2, 1 << (log2_chunk - 1)
        for i, entry in enumerate(struct.unpack(f"<{chunks}I", self.directory)):
            codec, length, first = entry >> 24, entry & 0xFFFFFF, i * step
            held = min(step, size - first)
            if codec > RANS or not 0 < length <= held or at + length > len(view) or (codec == RAW and length != held):
                raise CodecError(
                    f"Chunk {i} (codec {codec}, {length} bytes for {held}) is invalid; fetch the file again."
                )
            self.parts.append((codec, view[at : at + length], first, held))
            at += length
        if at != len(view):
            raise CodecError(f"The stream has {len(view) - at} bytes too many; fetch the file again.")

    def verify(self, packed: np.ndarray, crcs: Sequence[int]) -> None:
        if _checksum(self.head, self.count, self.directory, crcs) != self.check:
            raise CodecError("The checksum of the decoded codes is wrong; fetch the file again.")
        if self.count % 2 and packed[-1] >> 4 != 8:
            raise CodecError("The padding nibble is not code 0; fetch the file again.")


def decode_many(streams: Sequence[tuple[object, int]], threads: int | None = None) -> list[np.ndarray]:
    """Decode several code streams at once; far faster than one by one when many of them are small.

    Args:
        streams (sequence of `(stream, count)`): uint8 array, bytes or memoryview, and the number of codes its tensor has.
        threads (`int`, *optional*): workers for the deflate chunks; as many as there are processors by default.

    Returns:
        list of `np.ndarray` uint8 `[ceil(count / 2)]`.

    Raises:
        CodecError: on anything but exactly what an encoder wrote for that count.
    """
    parsed = [_Stream(stream, count) for stream, count in streams]
    outputs = [np.empty((stream.count + 1) // 2, dtype=np.uint8) for stream in parsed]
    crcs = [[0] * len(stream.parts) for stream in parsed]

    def store(i: int, j: int, data) -> None:
        _, _, first, held = parsed[i].parts[j]
        outputs[i][first : first + held] = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data
        crcs[i][j] = zlib.crc32(data)

    def plain(key: tuple[int, int]) -> None:
        codec, payload, _, held = parsed[key[0]].parts[key[1]]
        store(*key, payload if codec == RAW else _inflate(payload, held))

    keys = [(i, j) for i, stream in enumerate(parsed) for j in range(len(stream.parts))]
    rans = [(i, j) for i, j in keys if parsed[i].parts[j][0] == RANS]
    others = [(i, j) for i, j in keys if parsed[i].parts[j][0] != RANS]
    workers = min(threads or os.cpu_count() or 1, len(others))
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(plain, others))
    else:
        for key in others:
            plain(key)
    for batch in _rans_batches([(_Lanes(parsed[i].parts[j][1], parsed[i].parts[j][3]), i, j) for i, j in rans]):
        for (_, i, j), data in zip(batch, _rans_decode([job[0] for job in batch])):
            store(i, j, np.ascontiguousarray(data))
    for stream, output, checks in zip(parsed, outputs, crcs):
        stream.verify(output, checks)
    return outputs


def decode_codes(stream, count: int, threads: int | None = None) -> np.ndarray:
    """Decode one code stream to packed codes, see [`decode_many`]."""
    return decode_many([(stream, count)], threads)[0]


def encode_bytes(data: np.ndarray, planes: int = 1) -> np.ndarray:
    """Encode a small side array (row steps, outliers): byte planes, each Huffman-coded where that is smaller.

    Args:
        data (`np.ndarray` uint8): the bytes; view a bfloat16 or int16 array as uint8 first.
        planes (`int`): bytes per element, 1..8; 2 for bfloat16.

    Returns:
        `np.ndarray` uint8.
    """
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if not 1 <= planes <= 8 or data.size % planes:
        raise ValueError(f"{data.size} bytes do not split into {planes} planes; use 1..8 planes that divide them.")
    out = struct.pack("<BBI", _VERSION, planes, zlib.crc32(data))
    for p in range(planes):
        plane = np.ascontiguousarray(data[p::planes])
        huffman = _Huffman(np.bincount(plane, minlength=256))
        coded = huffman.size < plane.size
        payload = huffman.encode(plane) if coded else plane.tobytes()
        out += struct.pack("<BI", DEFLATE if coded else RAW, len(payload)) + payload
    return np.frombuffer(out, dtype=np.uint8)


def decode_bytes(stream, nbytes: int) -> np.ndarray:
    """Decode [`encode_bytes`] to uint8 `[nbytes]`; raises [`CodecError`] on anything wrong."""
    view = memoryview(np.ascontiguousarray(stream) if isinstance(stream, np.ndarray) else stream).cast("B")
    if len(view) < 6:
        raise CodecError(f"A side stream has at least 6 bytes, got {len(view)}; fetch the file again.")
    version, planes, check = struct.unpack_from("<BBI", view)
    if version != _VERSION or not 1 <= planes <= 8 or nbytes % planes:
        raise CodecError(f"Side stream version {version} with {planes} planes does not fit {nbytes} bytes.")
    held, at, parts = nbytes // planes, 6, []
    for _ in range(planes):
        if at + 5 > len(view):
            raise CodecError("The side stream is cut short; fetch the file again.")
        codec, length = struct.unpack_from("<BI", view, at)
        at += 5
        if codec > DEFLATE or length > held or at + length > len(view) or (codec == RAW and length != held):
            raise CodecError(f"A plane of {length} bytes cannot hold {held}; fetch the file again.")
        parts.append((codec, view[at : at + length]))
        at += length
    if at != len(view):
        raise CodecError(f"The side stream has {len(view) - at} bytes too many; fetch the file again.")
    out = np.empty(nbytes, dtype=np.uint8)
    for p, (codec, payload) in enumerate(parts):
        out[p::planes] = np.frombuffer(payload if codec == RAW else _inflate(payload, held), np.uint8)
    if zlib.crc32(out) != check:
        raise CodecError("The checksum of the side stream is wrong; fetch the file again.")
    return out
