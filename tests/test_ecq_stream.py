"""Weight streams: any alphabet, exact, of the predicted size, near the entropy, and safe on hostile bytes."""

import hashlib
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from damage import mutate
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_flashlite import ecq_stream_flashlite as ecq_stream
from modeling_flashlite.codec_flashlite import CodecError
from modeling_flashlite.ecq_modules_flashlite import EcqEmbedding, EcqLinear, to_quantized
from modeling_flashlite.ecq_reader_flashlite import decode_weights
from modeling_flashlite.ecq_stream_flashlite import encode_weight, stream_bytes
from modeling_flashlite.ecq_weight_flashlite import CODE_RANGE, QuantizedWeight, TiledWeight, thin_out, wide_columns


def decoded(stream, shape, threads=None) -> TiledWeight:
    """The weight of one stream, a tensor or bytes."""
    if isinstance(stream, bytes):
        stream = torch.from_numpy(np.frombuffer(stream, np.uint8).copy())
    ((weight,),) = decode_weights([[("w", stream, shape)]], threads)
    return weight


def gaussian(rows, columns, step=0.5, seed=0, wide=0, widest=0, scaled=False) -> QuantizedWeight:
    """Codes of Gaussian weights at a step in standard deviations, some columns 8, others 200 times as large."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) / step
    narrow = torch.randperm(columns, generator=generator)[wide + widest :]
    order = torch.randperm(columns, generator=generator)
    values[:, narrow] = values[:, narrow].clamp(-8, 7)
    values[:, order[:wide]] *= 8
    values[:, order[wide : wide + widest]] *= 200
    codes = values.round().clamp(*CODE_RANGE).to(torch.int16)
    exponents = torch.randint(-20, 20, (rows,), generator=generator, dtype=torch.int8)
    scales = torch.randint(-9, 9, (columns,), generator=generator, dtype=torch.int8) if scaled else None
    return QuantizedWeight(codes, 1 / 128, exponents, 8, scales)


def same(got: QuantizedWeight, want: QuantizedWeight) -> bool:
    scales = [weight.column_scale() for weight in (got, want)]
    scales = [torch.ones(got.shape[1]) if scale is None else scale for scale in scales]
    return (
        torch.equal(got.codes.to(torch.int16), want.codes.to(torch.int16))
        and torch.equal(got.step(), want.step())
        and torch.equal(*scales)
        and got.base == want.base
    )


@st.composite
def weights(draw):
    rows, columns = draw(st.integers(1, 200)), draw(st.integers(1, 90))
    digits = draw(st.lists(st.sampled_from([7, 7, 119, 1911]), min_size=columns, max_size=columns))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    limits = np.array(digits) * rng.random(columns)
    codes = np.rint(rng.normal(size=(rows, columns)) * limits / 3)
    codes = codes.clip([{7: -8, 119: -136, 1911: -2184}[d] for d in digits], digits)
    if draw(st.booleans()):
        codes[rng.integers(rows), rng.integers(columns)] = draw(st.sampled_from(CODE_RANGE))
    exponents = torch.from_numpy(rng.integers(-3, 4, rows) * draw(st.booleans())).to(torch.int8)
    scales = torch.from_numpy(rng.integers(-3, 4, columns)).to(torch.int8) if draw(st.booleans()) else None
    return QuantizedWeight(torch.from_numpy(codes).to(torch.int16), 0.25, exponents, draw(st.integers(1, 255)), scales)


@given(weights())
@settings(max_examples=150, deadline=None)
def test_round_trip(weight):
    """Codes of any range come back from tiles and from the file, whose size is known before; twice the same bytes."""
    tiled = TiledWeight.of(weight)
    assert same(tiled.quantized(), weight)
    stream = encode_weight(weight)
    assert len(stream) == stream_bytes(weight)
    back = decoded(stream, weight.shape)
    assert torch.equal(back.tiles, tiled.tiles) and all(map(torch.equal, back.wide, tiled.wide))
    assert (back.rare is None) == (tiled.rare is None) and all(map(torch.equal, back.rare or (), tiled.rare or ()))
    assert same(back.quantized(), weight)
    assert torch.equal(encode_weight(back.quantized()), stream)


@given(weights())
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_layers_compute_with_any_alphabet(weight):
    """Products and look-ups of tiles equal those of the plain matrix, whichever digits lie in the tiles."""
    rows, columns = weight.shape
    plain = weight.dequantize()
    linear = to_quantized(torch.nn.Linear(columns, rows, bias=False))
    table = to_quantized(torch.nn.Embedding(rows, columns))
    assert isinstance(linear, EcqLinear) and isinstance(table, EcqEmbedding)
    linear.set_quantized(weight)
    table.set_quantized(weight)
    assert same(linear.quantized(), weight) and torch.equal(linear.dequantize(), plain)
    torch.testing.assert_close(table(torch.arange(rows)), plain)
    for count in (1, 40):
        x = torch.randn(count, columns)
        want = x @ plain.T
        bound = 0.03 * x.norm(dim=1)[:, None] * plain.norm(dim=1)
        assert ((linear(x) - want).abs() <= bound).all()
    every = torch.arange(columns)
    whole = TiledWeight.whole(weight, (every, every))
    assert whole.rare is None and same(whole.quantized(), weight)
    assert same(thin_out([whole, whole])[1].quantized(), weight)


def test_gradients_pass_through_wide_columns():
    weight = gaussian(48, 40, wide=5, widest=2, scaled=True)
    linear = to_quantized(torch.nn.Linear(40, 48, bias=False))
    linear.set_quantized(weight)
    x = torch.randn(30, 40, requires_grad=True)
    linear(x).sum().backward()
    want = weight.dequantize().sum(0).expand(30, -1)
    assert (x.grad - want).norm() < 0.02 * want.norm()


def test_wide_columns_are_those_that_clipping_hurts():
    ratio = torch.randn(512, 40)
    ratio[:, 3] *= 6
    ratio[7, 11] = 40
    assert wide_columns(ratio).nonzero().flatten().tolist() == [3, 11]
    assert wide_columns(ratio, share=1e4).sum() == 0


def entropy_bits(codes: torch.Tensor) -> float:
    """Order-0 entropy of each column by itself, in bits; of all columns together if that is less."""
    counts = torch.unique(codes, return_counts=True)[1].double()
    return float((counts * (counts.sum().log2() - counts.log2())).sum())


@pytest.mark.parametrize(
    ("shape", "step", "most"),
    [((576, 576), 0.55, 1.012), ((1536, 576), 0.9, 1.01), ((4096, 512), 0.2, 1.01), ((1024, 512), 0.05, 1.012)],
)
def test_overhead(shape, step, most):
    """Steps, tables and headers included, over the entropy of all codes."""
    weight = QuantizedWeight((torch.randn(shape) / step).round().to(torch.int16), 1.0, torch.arange(shape[0]) % 5)
    weight.exponents = weight.exponents.to(torch.int8)
    assert 8 * stream_bytes(weight) < most * entropy_bits(weight.codes) + 8 * shape[0]


def test_columns_of_different_spread_have_tables_of_their_own():
    """Half of the columns with codes of -1..1: grouped, they cost what they hold."""
    codes = (torch.randn(2048, 256) * torch.where(torch.arange(256) % 2 == 0, 0.4, 3.0)).round().clamp(-8, 7)
    weight = QuantizedWeight(codes.to(torch.int8), 1.0, torch.zeros(2048, dtype=torch.int8))
    apart = entropy_bits(codes[:, ::2]) + entropy_bits(codes[:, 1::2])
    assert 8 * stream_bytes(weight) < 1.02 * apart < 0.95 * entropy_bits(codes)


def test_bytes_are_frozen():
    """Version 1 of the format, pinned."""
    digest = hashlib.sha256()
    for rows, columns in [(1, 1), (64, 32), (200, 77), (70, 500)]:
        i = torch.arange(rows * columns).view(rows, columns)
        codes = sum((i * (7919 + 2 * j) % 10007 * (31 + j) >> 4) % 5 for j in range(4)) - 8
        codes[:, 5:7] *= 9
        codes[:, 7:9] *= 90
        scales = (torch.arange(columns) % 7).to(torch.int8)
        weight = QuantizedWeight(
            codes.clamp(*CODE_RANGE).to(torch.int16), 0.5, torch.arange(rows).to(torch.int8), 8, scales
        )
        digest.update(encode_weight(weight).numpy().tobytes())
    assert digest.hexdigest() == "add3932b9cffb4f83bfc3a37db48a6777cd45618dd56b45878624e59809dc17a"


def test_bands_and_threads(monkeypatch):
    weight = gaussian(1000, 96, wide=7, widest=3)
    monkeypatch.setattr(ecq_stream, "_BAND_BYTES", 32 * 96 * 4)
    stream = encode_weight(weight)
    assert len(stream) == stream_bytes(weight)
    for threads in (1, 3):
        assert same(decoded(stream, weight.shape, threads).quantized(), weight)
    other = gaussian(70, 96, wide=2, seed=1)
    many = [[("w", stream, weight.shape), ("v", encode_weight(other), other.shape)]] * 3
    for first, last in decode_weights(iter(many)):
        assert same(first.quantized(), weight) and same(last.quantized(), other)
        assert first.tiles.data_ptr() + first.tiles.nbytes == last.tiles.data_ptr()
        assert all(map(torch.equal, first.wide, last.wide))


@pytest.mark.parametrize("codes", [torch.full((8, 8), 1912), torch.full((8, 8), -2185), torch.zeros(8, 8)])
def test_codes_that_do_not_fit_are_refused(codes):
    codes = codes if codes.is_floating_point() else codes.to(torch.int16)
    for use in (TiledWeight.of, stream_bytes, encode_weight):
        with pytest.raises(ValueError, match=r"-2184\.\.1911"):
            use(QuantizedWeight(codes, 1.0, torch.zeros(8, dtype=torch.int8)))


def targets():
    cases = [(24, 40, 0, 0), (64, 32, 2, 0), (131, 64, 4, 3), (3, 1000, 0, 1)]
    made = [gaussian(r, c, wide=a, widest=b, scaled=r > 30, seed=r) for r, c, a, b in cases]
    return [(encode_weight(weight).numpy().tobytes(), weight) for weight in made]


def with_checksum(data: bytes, shape) -> bytes:
    """The stream with the checksum of what it holds: what an attacker would write, who knows the format."""
    if len(data) < 12:
        return data
    check = zlib.crc32(data[12:], zlib.crc32(struct.pack("<II", *shape) + data[:8]))
    return data[:8] + struct.pack("<I", check) + data[12:]


def test_mutated_streams_fail_or_are_exact():
    rng, made = random.Random(0), targets()
    refused = 0
    for _ in range(4000):
        stream, weight = rng.choice(made)
        damaged = mutate(rng, stream, rng.choice(made)[0])
        try:
            got = decoded(damaged, weight.shape, 1)
        except CodecError:
            refused += 1
            continue
        assert same(got.quantized(), weight)
    assert refused > 3000


def test_forged_streams_are_bounded():
    """With a checksum that fits, anything may come out, but of the right shape, in little memory, or a CodecError."""
    rng, made = random.Random(1), targets()
    tracemalloc.start()
    for _ in range(4000):
        stream, weight = rng.choice(made)
        damaged = with_checksum(mutate(rng, stream, rng.choice(made)[0]), weight.shape)
        try:
            got = decoded(damaged, weight.shape, 1)
        except CodecError:
            continue
        codes = got.quantized()
        assert codes.shape == weight.shape and torch.isfinite(codes.dequantize()).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@given(st.binary(max_size=300), st.integers(1, 2**31), st.integers(1, 2**31))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(data, rows, columns):
    """Whatever the shape: nothing is allocated for it."""
    for stream in (data, bytes([0xE9, 1]) + data):
        with pytest.raises(CodecError):
            decoded(stream, (rows, columns), 1)


def test_streams_of_another_shape_fail():
    stream = targets()[0][0]
    for shape in ((40, 24), (24, 41), (1, 960), (10**6, 10**4)):
        with pytest.raises(CodecError):
            decoded(stream, shape)
