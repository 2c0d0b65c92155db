"""Entropy coder of Flash-Lite: int4 codes and small side arrays to bytes and back, exactly.

It needs the standard library and numpy only, decodes untrusted bytes safely, and writes the same bytes on every
machine. Over the order-0 entropy of Gaussian codes, everything included: 0.3 to 1.1% for tensors of 64k weights and
more (between 3.2 and 1 bits per weight), 3% at 4k. Inflating runs at 400 to 500 M weights per second and thread.

Packed codes
    A code q in -8..7 is stored as the nibble q + 8; byte i holds weight 2i in its low and weight 2i + 1 in its high
    nibble. An odd count is padded with code 0 (nibble 8). Packing before coding matters: Huffman on single nibbles
    loses 3.4% against the entropy, on pairs about 0.6%.

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
    1 deflate  one raw deflate stream (RFC 1951, no wrapper); the encoder writes a single dynamic block, literals only.
    2 rans     256-symbol range ANS over the packed bytes in independent lanes; byte i is symbol i // lanes of lane
               i % lanes, and the last symbols of the last lanes, if any, are padding.
               16 bytes  nibble j has probability proportional to 2**(-byte_j / 16); 255: it does not occur
               u16       lanes L, with at most 8192 symbols in a lane
               L x u16   words in each lane
               L x u32   state of each lane, at least 2**16
               words     u16, lane after lane, in reading order
               A byte's frequency (of 2**15) is the product of its nibbles' probabilities, rounded by integer rules:
               `pair_frequencies` in `rans_flashlite.py`; `start` is the sum of the frequencies before it.
               Decoding a symbol: slot = x mod 2**15 lies in [start, start + freq) of one symbol,
               x = freq * (x >> 15) + slot - start; then, if x < 2**16, x = x * 2**16 + the next word.
               A lane must end in state 2**16 with all of its words read.

Side stream (`encode_bytes`), version 1
    u8 version 1, u8 plane count P, u32 CRC-32 of the decoded bytes, then for each plane u8 codec (0 or 1 above),
    u32 length, payload. Plane p holds bytes p, p + P, p + 2P, ... (P = 2 splits bfloat16 into low and high bytes).

What a decoder checks before it trusts anything: lengths against the caller's count before the output is allocated, a
bound on what inflate may produce, exact length, end of stream, nothing unused, lane end states, checksum. Work and
memory are bounded by the count, so it cannot hang. Every failure is a `CodecError`.
"""

from __future__ import annotations

import collections
import itertools
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from .huffman_flashlite import CodecError, Huffman, inflate
from .rans_flashlite import Lanes, Rans, rans_batches, rans_decode, rans_encode

RAW, DEFLATE, RANS = 0, 1, 2
_MAGIC, _VERSION = 0xEC, 1
_LOG2_CHUNK, _LOG2_CHUNKS = 21, range(12, 23)  # what the encoder writes, what a decoder accepts
_BIG_CHUNK = 1 << 15  # packed bytes
_RANS_MARGINS = (0.004, 0.0125)  # inflate is faster, so rANS has to save this share of a small and of a big chunk
_AHEAD = 1 << 20  # bytes of streams that are decoded or wait for it, per worker
_RANS_AHEAD = 1 << 22  # bytes that rANS chunks will have before they are decoded together


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


def _plan(chunk: np.ndarray) -> tuple[int, Huffman | Rans | None, int]:
    """(codec, its plan, size in bytes) for the packed bytes of one chunk."""
    histogram = np.bincount(chunk, minlength=256)
    huffman, rans = Huffman(histogram), Rans(histogram)
    codec, size = RAW, chunk.size
    plan: Huffman | Rans | None = None
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
                payloads[i, j] = codec, plan.encode(chunk) if isinstance(plan, Huffman) else chunk.tobytes()
    for batch in rans_batches(rans_jobs):
        coded = rans_encode([(chunk, plan) for plan, _, chunk in batch])
        payloads.update({key: (RANS, payload) for (_, key, _), payload in zip(batch, coded)})
    streams = []
    for i, ((_, count), chunks) in enumerate(zip(arrays, split)):
        parts = [payloads[i, j] for j in range(len(chunks))]
        directory = b"".join(struct.pack("<I", codec << 24 | len(payload)) for codec, payload in parts)
        head = struct.pack("<BBBB", _MAGIC, _VERSION, _LOG2_CHUNK, 0)
        check = _checksum(head, count, directory, [zlib.crc32(chunk) for chunk in chunks])
        stream = head + struct.pack("<I", check) + directory + b"".join(payload for _, payload in parts)
        streams.append(np.frombuffer(stream, dtype=np.uint8))
    return streams


def encode_codes(packed: np.ndarray, count: int) -> np.ndarray:
    """Encode one packed code array, see [`encode_many`]."""
    return encode_many([(packed, count)])[0]


def _checksum(head: bytes, count: int, directory: bytes, crcs: Sequence[int]) -> int:
    return zlib.crc32(head + struct.pack("<Q", count) + directory + struct.pack(f"<{len(crcs)}I", *crcs))


def _bytes(stream) -> memoryview:
    return memoryview(np.ascontiguousarray(stream) if isinstance(stream, np.ndarray) else stream).cast("B")


class _Stream:
    """A code stream with its directory read and every length checked against `count`, decoded chunk by chunk."""

    def __init__(self, stream, count: int, output: np.ndarray | None = None):
        view = _bytes(stream)
        if count < 0 or len(view) < 8:
            raise CodecError(f"A code stream has at least 8 bytes, got {len(view)}; fetch the file again.")
        self.head, (magic, version, log2_chunk, reserved) = bytes(view[:4]), view[:4]
        if magic != _MAGIC or version != _VERSION or reserved:
            raise CodecError(
                f"Not a version {_VERSION} code stream (starts with {self.head.hex()}); update the package."
            )
        if log2_chunk not in _LOG2_CHUNKS:
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
        self.size, self.crcs = len(view), [0] * chunks
        self.packed = np.empty(size, dtype=np.uint8) if output is None else output

    def lanes(self, i: int) -> Lanes:
        _, payload, _, held = self.parts[i]
        return Lanes(payload, held)

    def put(self, i: int, data: np.ndarray | None = None) -> None:
        """Put chunk i, or `data` where it was decoded elsewhere, into its place."""
        codec, payload, first, held = self.parts[i]
        out = self.packed[first : first + held]
        if codec == DEFLATE:
            inflate(payload, out)
        else:
            out[:] = np.frombuffer(payload, np.uint8) if data is None else data
        self.crcs[i] = zlib.crc32(out)

    def verified(self) -> np.ndarray:
        """The packed codes, once all chunks are there."""
        if _checksum(self.head, self.count, self.directory, self.crcs) != self.check:
            raise CodecError("The checksum of the decoded codes is wrong; fetch the file again.")
        if self.count % 2 and self.packed[-1] >> 4 != 8:
            raise CodecError("The padding nibble is not code 0; fetch the file again.")
        return self.packed


def decode_groups(
    groups: Iterable[Sequence[tuple[object, int, np.ndarray | None]]], threads: int | None = None
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Decode groups of code streams, several at a time, and hand each over as soon as it is done.

    A group is taken from `groups` shortly before its turn, so a generator may open what it reads late and find it
    unneeded early. Groups with rANS chunks wait for one another, since many lanes take no longer than few.

    Args:
        groups (iterable of sequences of `(stream, count, output)`): uint8 array, bytes or memoryview; the number of
            codes it holds; memory to decode to, uint8 `[ceil(count / 2)]`, made here where it is `None`.
        threads (`int`, *optional*): workers; as many as there are processors by default.

    Yields:
        `(position of the group, list of np.ndarray uint8 [ceil(count / 2)])`, not in order.

    Raises:
        CodecError: on anything but exactly what an encoder wrote for that count.
    """
    workers = threads or os.cpu_count() or 1
    running = collections.deque[tuple[int, list[_Stream], list[Future]]]()
    waiting: list[tuple[int, list[_Stream], list[Future]]] = []
    lanes: list[tuple[Lanes, _Stream, int]] = []
    pool = ThreadPoolExecutor(workers)
    try:
        for position, group in enumerate(groups):
            streams = [_Stream(*item) for item in group]
            chunks = [(stream, i) for stream in streams for i in range(len(stream.parts))]
            plain = [chunk for chunk in chunks if chunk[0].parts[chunk[1]][0] != RANS]
            tasks = [pool.submit(stream.put, i) for stream, i in plain]
            own = [(stream.lanes(i), stream, i) for stream, i in chunks if stream.parts[i][0] == RANS]
            (waiting if own else running).append((position, streams, tasks))
            del group
            lanes += own
            if sum(job.size for job, *_ in lanes) > _RANS_AHEAD:
                batches, lanes = [pool.submit(_decode_rans, batch) for batch in rans_batches(lanes)], []
                yield from (_finished(*held, batches) for held in waiting)
                waiting = []
            while sum(stream.size for _, held, _ in running for stream in held) > workers * _AHEAD:
                yield _finished(*running.popleft())
        batches = [pool.submit(_decode_rans, batch) for batch in rans_batches(lanes)]
        while running:
            yield _finished(*running.popleft())
        yield from (_finished(*held, batches) for held in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_rans(batch: list[tuple[Lanes, _Stream, int]]) -> None:
    for (_, stream, i), data in zip(batch, rans_decode([job[0] for job in batch])):
        stream.put(i, data)


def _finished(position: int, streams: list[_Stream], *tasks: list[Future]) -> tuple[int, list[np.ndarray]]:
    for task in itertools.chain(*tasks):
        task.result()
    return position, [stream.verified() for stream in streams]


def decode_many(streams: Sequence[tuple[object, int]], threads: int | None = None) -> list[np.ndarray]:
    """Decode several code streams, `(stream, count)`, at once; see [`decode_groups`]."""
    decoded = dict(decode_groups(([(stream, count, None)] for stream, count in streams), threads))
    return [decoded[i][0] for i in range(len(decoded))]


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
        huffman = Huffman(np.bincount(plane, minlength=256))
        coded = huffman.size < plane.size
        payload = huffman.encode(plane) if coded else plane.tobytes()
        out += struct.pack("<BI", DEFLATE if coded else RAW, len(payload)) + payload
    return np.frombuffer(out, dtype=np.uint8)


def decode_bytes(stream, nbytes: int) -> np.ndarray:
    """Decode [`encode_bytes`] to uint8 `[nbytes]`; raises [`CodecError`] on anything wrong."""
    view = _bytes(stream)
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
        plane = np.frombuffer(payload, np.uint8)
        if codec == DEFLATE:
            plane = np.empty(held, dtype=np.uint8)
            inflate(payload, plane)
        out[p::planes] = plane
    if zlib.crc32(out) != check:
        raise CodecError("The checksum of the side stream is wrong; fetch the file again.")
    return out
