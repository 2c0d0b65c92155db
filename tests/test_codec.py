"""The entropy coder: exact, near the entropy, deterministic, and safe on hostile bytes."""

import contextlib
import hashlib
import math
import random
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_flashlite import codec_flashlite as codec
from modeling_flashlite.codec_flashlite import (
    DEFLATE,
    RANS,
    RAW,
    CodecError,
    coded_size,
    decode_bytes,
    decode_codes,
    decode_many,
    encode_bytes,
    encode_codes,
    encode_many,
    entropy_bits,
    pack_codes,
    unpack_codes,
)
from modeling_flashlite.huffman_flashlite import Huffman, inflate
from modeling_flashlite.rans_flashlite import Lanes, Rans, rans_decode, rans_encode


def gaussian_codes(count, step, seed=0):
    """Codes of a unit Gaussian at a step given in standard deviations."""
    values = np.random.default_rng(seed).standard_normal(count)
    return np.clip(np.rint(values / step), -8, 7).astype(np.int8)


def codec_of(stream):
    """Codec of the first chunk."""
    return stream[11]


@st.composite
def code_arrays(draw, max_count=3000):
    """Codes of any length and skew, from a single value to uniform."""
    count, seed = draw(st.integers(0, max_count)), draw(st.integers(0, 2**32 - 1))
    alphabet = draw(st.lists(st.integers(-8, 7), min_size=1, max_size=16, unique=True))
    skew = draw(st.floats(0, 3))
    p = np.exp(-skew * np.arange(len(alphabet)))
    return np.random.default_rng(seed).choice(np.array(alphabet, dtype=np.int8), size=count, p=p / p.sum())


@given(code_arrays())
@settings(max_examples=60, deadline=None)
def test_round_trip(codes):
    packed = pack_codes(codes)
    assert packed.dtype == np.uint8 and packed.shape == ((codes.size + 1) // 2,)
    np.testing.assert_array_equal(unpack_codes(packed, codes.size), codes)
    stream = encode_codes(packed, codes.size)
    np.testing.assert_array_equal(decode_codes(stream, codes.size), packed)
    np.testing.assert_array_equal(decode_codes(stream.tobytes(), codes.size, threads=1), packed)
    assert stream.size <= 12 + packed.size


@given(code_arrays(), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_every_codec_alone(codes, lanes):
    """Huffman and rANS are exact for every histogram, also where they would not be chosen."""
    packed = pack_codes(codes)
    if not packed.size:
        return
    histogram = np.bincount(packed, minlength=256)
    huffman, rans = Huffman(histogram), Rans(histogram)
    payload = huffman.encode(packed)
    assert len(payload) == huffman.size
    inflated = np.empty_like(packed)
    inflate(memoryview(payload), inflated)
    assert np.array_equal(inflated, packed)
    assert zlib.decompress(payload, -15) == packed.tobytes()
    rans.lanes = min(lanes, packed.size)
    rans.steps = math.ceil(packed.size / rans.lanes)
    (coded,) = rans_encode([(packed, rans)])
    np.testing.assert_array_equal(next(rans_decode([Lanes(memoryview(coded), packed.size)])), packed)


@pytest.mark.parametrize(
    "data",
    [
        np.zeros(1, np.uint8),
        np.zeros(70_001, np.uint8),
        np.arange(256, dtype=np.uint8),
        np.repeat(np.arange(24, dtype=np.uint8), [int(1.618**i) + 1 for i in range(24)]),
    ],
    ids=["one", "constant", "uniform", "fibonacci"],
)
def test_huffman_on_extreme_histograms(data):
    """One symbol, 256 equal ones, and counts whose unlimited code would be longer than the 15 bits deflate has."""
    huffman = Huffman(np.bincount(data, minlength=256))
    assert huffman.lengths.max() <= 15
    assert zlib.decompress(huffman.encode(data), -15) == data.tobytes()


def test_packed_order():
    np.testing.assert_array_equal(pack_codes(np.array([[-8, 7], [0, 1], [3, 3]], dtype=np.int8)), [0xF0, 0x98, 0xBB])
    np.testing.assert_array_equal(pack_codes(np.array([-8])), [0x80])
    with pytest.raises(ValueError, match="-8..7"):
        pack_codes(np.array([8]))


def test_many_tensors_at_once_equal_one_by_one():
    arrays = [
        (pack_codes(gaussian_codes(n, k, n)), n) for n, k in [(7, 1), (4099, 0.8), (70_000, 1.5), (300_000, 0.6)]
    ]
    streams = encode_many(arrays)
    for (packed, count), stream, decoded in zip(
        arrays, streams, decode_many([(stream, count) for stream, (_, count) in zip(streams, arrays)])
    ):
        np.testing.assert_array_equal(stream, encode_codes(packed, count))
        np.testing.assert_array_equal(decoded, packed)


def test_chunks_and_threads(monkeypatch):
    monkeypatch.setattr(codec, "_LOG2_CHUNK", 12)
    for step in (0.02, 0.5, 2.5):
        codes = gaussian_codes(30_001, step)
        packed = pack_codes(codes)
        stream = encode_codes(packed, codes.size)
        for threads in (1, 3):
            np.testing.assert_array_equal(decode_codes(stream, codes.size, threads), packed)


def test_codec_choice():
    uniform = np.random.default_rng(0).integers(-8, 8, 1 << 17).astype(np.int8)
    cases = {RAW: uniform, DEFLATE: gaussian_codes(1 << 19, 0.8), RANS: gaussian_codes(1 << 14, 1.5)}
    for expected, codes in cases.items():
        stream = encode_codes(pack_codes(codes), codes.size)
        assert codec_of(stream) == expected
        assert abs(coded_size(pack_codes(codes), codes.size) - stream.size) <= 0.001 * stream.size


def test_overhead_on_a_small_model():
    """Tables, headers and all: within 1% of the entropy over a mix like that of a model of 5 M parameters."""
    counts = [64 * 64] * 8 + [256 * 256] * 8 + [256 * 352] * 12 + [2_000_000]
    tensors = [gaussian_codes(n, k, i) for i, (n, k) in enumerate(zip(counts, [0.7, 0.8, 1.0, 0.9] * 8))]
    streams = encode_many([(pack_codes(codes), codes.size) for codes in tensors])
    ideal = sum(entropy_bits(codes) * codes.size / 8 for codes in tensors)
    assert sum(stream.size for stream in streams) < 1.01 * ideal


def test_bytes_are_frozen():
    """Version 1 of the format, pinned: the encoder's bytes may not change under a released checkpoint."""
    digest = hashlib.sha256()
    for count, scale in [(1, 1), (999, 1), (5000, 3), (400_001, 2)]:
        i = np.arange(count, dtype=np.int64)
        dice = sum((i * (7919 + 2 * j) % 10007 * (31 + j) >> 4) % 5 for j in range(4)) - 8
        stream = encode_codes(pack_codes((dice // scale).clip(-8, 7)), count)
        digest.update(stream.tobytes())
    digest.update(encode_bytes(np.arange(900, dtype=np.uint16).view(np.uint8), planes=2).tobytes())
    assert digest.hexdigest() == "d12d66aced11c8cc7f981d2a1388531cc3131de289c1610a2173195a3bbad522"


@given(st.binary(max_size=400), st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_side_bytes(data, planes):
    data = np.frombuffer(data[: len(data) // planes * planes], dtype=np.uint8)
    stream = encode_bytes(data, planes)
    np.testing.assert_array_equal(decode_bytes(stream, data.size), data)
    assert stream.size <= 6 + 5 * planes + data.size


def test_side_bytes_compress_row_steps():
    steps = np.exp(np.random.default_rng(0).normal(-4, 0.1, 512)).astype(np.float32).view(np.uint32) >> 16
    data = steps.astype(np.uint16).view(np.uint8)
    assert encode_bytes(data, planes=2).size < 0.75 * data.size


def hostile_targets():
    """(stream, count, packed codes) with every codec forced once, small enough to decode thousands of times."""
    targets = []
    for kind, count in [(RAW, 301), (DEFLATE, 2001), (RANS, 121)]:
        packed = pack_codes(gaussian_codes(count, 0.6))
        histogram = np.bincount(packed, minlength=256)
        if kind == RAW:
            payload = packed.tobytes()
        elif kind == DEFLATE:
            payload = Huffman(histogram).encode(packed)
        else:
            (payload,) = rans_encode([(packed, Rans(histogram))])
        head, directory = bytes([0xEC, 1, 21, 0]), (kind << 24 | len(payload)).to_bytes(4, "little")
        check = codec._checksum(head, count, directory, [zlib.crc32(packed)])
        targets.append((head + check.to_bytes(4, "little") + directory + payload, count, packed))
    return targets


def mutate(rng, stream, other):
    """A flipped bit, a random byte, a cut, an insertion, or the head of one stream on the tail of another."""
    data = bytearray(stream)
    kind = rng.randrange(5)
    at = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(48, len(data)))
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.randrange(256)
    elif kind == 2:
        del data[at : at + rng.choice([1, 2, 4, len(data)])]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 64]))
    else:
        data[at:] = other[min(at, len(other)) :]
    return bytes(data)


def test_hostile_code_streams():
    """Thousands of damaged streams: the exact array or a CodecError, in bounded memory."""
    rng = random.Random(0)
    targets = hostile_targets()
    tracemalloc.start()
    refused = 0
    for _ in range(3000):
        stream, count, packed = rng.choice(targets)
        damaged = mutate(rng, stream, rng.choice(targets)[0])
        try:
            np.testing.assert_array_equal(decode_codes(damaged, count, threads=1), packed)
        except CodecError:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 2500
    assert peak < 4 << 20


@given(st.binary(max_size=200), st.integers(0, 2**62))
@settings(max_examples=200, deadline=None)
def test_hostile_random_bytes(data, count):
    """Neither random bytes nor the header of a stream followed by them decode to anything, whatever the count."""
    for stream in (data, bytes([0xEC, 1, 12, 0]) + data, bytes([0xEC, 1, 22, 0]) + data):
        if count:
            with pytest.raises(CodecError):
                decode_codes(stream, count)
        with pytest.raises(CodecError):
            decode_bytes(stream, count + 1)


def test_hostile_side_streams():
    rng = random.Random(1)
    data = np.repeat(np.arange(40, dtype=np.uint8), 7)
    streams = [encode_bytes(data, planes).tobytes() for planes in (1, 2)]
    for _ in range(2000):
        damaged = mutate(rng, rng.choice(streams), rng.choice(streams))
        with contextlib.suppress(CodecError):
            np.testing.assert_array_equal(decode_bytes(damaged, data.size), data)


def test_bomb_is_not_inflated():
    """A deflate payload that would expand to 64 MB stops one byte after what the count allows."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    payload = compressor.compress(bytes(64 << 20)) + compressor.flush()
    tracemalloc.start()
    with pytest.raises(CodecError, match="exactly"):
        inflate(memoryview(payload), np.empty(1000, np.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_swapped_chunks_are_refused(monkeypatch):
    """Each chunk of a splice is valid by itself; the checksum over all of them is not."""
    monkeypatch.setattr(codec, "_LOG2_CHUNK", 12)
    codes = np.random.default_rng(0).integers(-8, 8, 8192).astype(np.int8)
    stream = encode_codes(pack_codes(codes), codes.size)
    swapped = np.concatenate([stream[:16], stream[16 + 2048 :], stream[16 : 16 + 2048]])
    with pytest.raises(CodecError, match="checksum"):
        decode_codes(swapped, codes.size)


@pytest.mark.parametrize("count", [0, 400, 402, 800])
def test_wrong_count_is_refused(count):
    stream = encode_codes(pack_codes(gaussian_codes(401, 1.0)), 401)
    with pytest.raises(CodecError):
        decode_codes(stream, count)
