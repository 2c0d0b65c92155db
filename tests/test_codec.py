"""The entropy coder: exact, near the entropy, deterministic, and safe on hostile bytes."""

import contextlib
import hashlib
import random
import tracemalloc
import zlib

import numpy as np
import pytest
from damage import mutate
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_flashlite.codec_flashlite import CodecError, Huffman, chunk_bytes, decode_chunk, encode_chunk


@st.composite
def byte_arrays(draw, max_count=3000):
    """Bytes of any number and skew, from a single value to uniform."""
    count, seed = draw(st.integers(0, max_count)), draw(st.integers(0, 2**32 - 1))
    alphabet = draw(st.lists(st.integers(0, 255), min_size=1, max_size=256, unique=True))
    p = np.exp(-draw(st.floats(0, 3)) * np.arange(len(alphabet)))
    return np.random.default_rng(seed).choice(np.array(alphabet, dtype=np.uint8), size=count, p=p / p.sum())


@given(byte_arrays())
@settings(max_examples=100, deadline=None)
def test_round_trip(data):
    payload = encode_chunk(data)
    assert len(payload) <= data.size
    if data.size:
        assert len(payload) == chunk_bytes(np.bincount(data, minlength=256))
    np.testing.assert_array_equal(decode_chunk(payload, data.size), data)


@given(byte_arrays())
@settings(max_examples=100, deadline=None)
def test_huffman_is_a_deflate_block(data):
    """Any reader of deflate gets the bytes back, also where the block would not be chosen."""
    huffman = Huffman(np.bincount(data, minlength=256))
    payload = huffman.encode(data)
    assert len(payload) == huffman.size
    assert zlib.decompress(payload, -15) == data.tobytes()


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


def test_lengths_are_optimal():
    """Within one bit of the entropy, below it nowhere, for any histogram; Kraft's sum is 1."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(0, 1 + 2 ** rng.integers(1, 20), 256) * (rng.random(256) < rng.random())
        if (counts > 0).sum() < 2:
            continue
        lengths = Huffman(counts).lengths
        assert np.sum(2.0 ** -lengths[lengths > 0]) == 1
        p = counts / counts.sum()
        entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
        assert entropy <= (p * lengths[:256]).sum() + 1e-9 < entropy + 1 + 1e-6


def test_bytes_are_frozen():
    """The encoder's bytes may not change under a released checkpoint."""
    digest = hashlib.sha256()
    for count, scale in [(1, 1), (999, 1), (5000, 3), (400_001, 2)]:
        i = np.arange(count, dtype=np.int64)
        dice = sum((i * (7919 + 2 * j) % 10007 * (31 + j) >> 4) % 5 for j in range(4))
        digest.update(encode_chunk((dice // scale).astype(np.uint8)))
    assert digest.hexdigest() == "081036fdf9bf6b38b98f6ee8a5be1a3aeda9fee541938f97aebbae25c613f049"


def test_hostile_chunks():
    """Thousands of damaged chunks: some array of the right size or a CodecError, in bounded memory.

    What a chunk cannot see, the checksum of its stream does.
    """
    rng = random.Random(0)
    datas = [
        np.random.default_rng(i).binomial(20, 0.3, size).astype(np.uint8) for i, size in enumerate((40, 999, 3000))
    ]
    chunks = [encode_chunk(data) for data in datas]
    tracemalloc.start()
    refused = 0
    for _ in range(5000):
        i = rng.randrange(3)
        damaged = mutate(rng, chunks[i], rng.choice(chunks))
        try:
            assert decode_chunk(damaged, datas[i].size).shape == datas[i].shape
        except CodecError:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 2000
    assert peak < 1 << 20


@given(st.binary(max_size=200), st.integers(1, 10**5))
@settings(max_examples=300, deadline=None)
def test_random_bytes(data, size):
    with contextlib.suppress(CodecError):
        assert decode_chunk(data, size).size == size


def test_bomb_is_not_inflated():
    """A payload that would expand to 64 MB stops one byte after what the size allows."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    payload = compressor.compress(bytes(64 << 20)) + compressor.flush()
    tracemalloc.start()
    with pytest.raises(CodecError, match="exactly"):
        decode_chunk(payload, len(payload) + 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("size", [0, 999, 1001, 5000])
def test_wrong_size_is_refused(size):
    payload = encode_chunk(np.random.default_rng(0).binomial(20, 0.3, 1000).astype(np.uint8))
    with pytest.raises(CodecError):
        decode_chunk(payload, size)
