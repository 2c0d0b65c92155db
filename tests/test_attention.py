"""Multi-axis attention: every path against the reference, and properties that all paths share."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensors import cross_inputs, dense, first_queries, largest_gap, qkv, random
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import modeling_flashlite.attention_flashlite as attention
import modeling_flashlite.attention_parts_flashlite as parts
from modeling_flashlite.attention_flashlite import (
    AxisSpec,
    BlockSummaries,
    multi_axis_attention,
    multi_axis_attention_reference,
    summarize_blocks,
)


@st.composite
def calls(draw):
    """A call of the attention: (seed, spec, shapes, start, cross, first) with ragged rows, any heads and any axis."""
    c = draw(st.sampled_from([1, 2, 4]))
    b = c * draw(st.sampled_from([1, 2, 4]))
    spec = AxisSpec(b, c, draw(st.sampled_from([0, 1, 2, 3, None])), draw(st.sampled_from([None, 0, 1, 2, 4, 6])))
    batch, queries = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 5, 17, 18, 40]))
    starts = [draw(st.integers(0, 14 * b)) for _ in range(batch)]
    start = starts[0] if draw(st.booleans()) else torch.tensor(starts)
    keys = max(starts) + queries + draw(st.integers(0, b + 1))
    shapes = {"batch": batch, "hkv": draw(st.sampled_from([1, 2, 4])), "queries": queries, "keys": keys}
    shapes["dv"] = draw(st.sampled_from([8, 6, 10]))
    cross = draw(st.sampled_from([None, "all", "masked"]))
    return draw(st.integers(0, 999)), spec, shapes, start, cross, draw(st.booleans())


def paths_for(spec, queries, start):
    """The paths that can serve a call, by name."""
    paths = {"dispatch": None}
    few_candidates = spec.memory_blocks is not None and (
        spec.relevance_top_k is None or spec.memory_blocks - 1 <= spec.relevance_top_k
    )
    if spec.relevance_top_k is None or few_candidates:
        return paths
    paths["tiles"] = attention._tile_attention
    starts = start if isinstance(start, torch.Tensor) else torch.tensor([start])
    if queries <= 5 and int(starts.max() + queries - 1) // spec.block_size >= 3:
        paths["step"] = attention._step_attention
    return paths


@pytest.fixture(params=["gathered", "pairs"])
def selected(request, monkeypatch):
    """Selected blocks, all of them small here, in either of their two ways through the long path."""
    monkeypatch.setattr(parts, "_TILE_KEYS", 1 if request.param == "pairs" else 32)
    return request.param


SLOW_HOST = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, derandomize=True, **SLOW_HOST)
@given(calls())
def test_every_path_equals_the_reference_in_values_and_gradients(selected, call):
    seed, spec, shapes, start, kind, others = call
    torch.manual_seed(seed)
    inputs = qkv(**shapes, grad=True)
    cross = cross_inputs(kind, shapes["batch"], shapes["hkv"], shapes["dv"], grad=True)
    leaves, first = inputs if cross is None else inputs + cross[:2], None
    if others and spec.memory_blocks is not None:
        first, leaf = first_queries(inputs[0], spec, start)
        leaves = (*leaves, leaf)
    expected = multi_axis_attention_reference(*inputs, spec, start=start, cross=cross, first_query=first)[0]
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, grad, retain_graph=True)
    for name, path in paths_for(spec, shapes["queries"], start).items():
        if path is None:
            out = multi_axis_attention(*inputs, spec, start=start, cross=cross, first_query=first)
        else:
            out = path(*inputs, spec, start, None, cross, first, None)
        grads = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        assert largest_gap((expected, *expected_grads), (out, *grads)) < 1e-12, name


@pytest.mark.parametrize("kind", [None, "masked"])
def test_tiles_without_the_private_op_are_the_same(monkeypatch, kind, selected):
    monkeypatch.setattr(parts, "_flash", None)
    inputs, spec = qkv(2, queries=70, keys=75, grad=True), AxisSpec(4, 2, 2, 8)
    cross = cross_inputs(kind, 2, 2, 8, grad=True)
    leaves = inputs if cross is None else inputs + cross[:2]
    expected = multi_axis_attention_reference(*inputs, spec, start=5, cross=cross)[0]
    out = attention._tile_attention(*inputs, spec, 5, None, cross, None, None)
    grad = torch.randn_like(out)
    gaps = zip(torch.autograd.grad(expected, leaves, grad), torch.autograd.grad(out, leaves, grad))
    assert (expected - out).abs().max() < 1e-12
    assert all((x - y).abs().max() < 1e-12 for x, y in gaps)


def test_weights_are_a_distribution_and_explain_the_output():
    q, k, v = qkv(2, queries=50, keys=60, dv=6)
    cross = cross_inputs("masked", 2, 2, 6, grad=False)
    out, weights, cross_weights = multi_axis_attention_reference(q, k, v, AxisSpec(4, 2, 2, 6), start=9, cross=cross)
    spread = [x.repeat_interleave(2, 1) for x in (v, cross[1])]
    assert (weights.sum(-1) + cross_weights.sum(-1) - 1).abs().max() < 1e-14
    assert (out - weights @ spread[0] - cross_weights @ spread[1]).abs().max() < 1e-14


@pytest.mark.parametrize("ragged", [False, True])
def test_decoding_step_by_step_and_in_uneven_chunks_equals_one_pass(ragged):
    spec, length = AxisSpec(4, 2, 2, 7), 90
    q, k, v = qkv(2, queries=length, dv=6)
    expected = multi_axis_attention_reference(q, k, v, spec)[0]
    lag = torch.tensor([0, 5]) if ragged else 0
    for chunk in (1, 3, 7):
        for lo in range(5, length - chunk, 7):
            start = lo - lag
            rows = [lo - 5 * row * ragged for row in range(2)]
            part = torch.stack([q[row, :, at : at + chunk] for row, at in enumerate(rows)])
            summaries = summarize_blocks(k, v, spec)
            out = multi_axis_attention(part, k, v, spec, start=start, summaries=summaries)
            right = torch.stack([expected[row, :, at : at + chunk] for row, at in enumerate(rows)])
            assert (out - right).abs().max() < 1e-12


def test_selection_does_not_flip_between_paths_in_float32():
    torch.manual_seed(0)
    q, k, v = qkv(queries=512, dtype=torch.float32, dk=16, dv=16)
    spec = AxisSpec(8, 4, 3, None)
    whole, summaries = multi_axis_attention(q, k, v, spec), summarize_blocks(k, v, spec)
    for t in range(40, 512):
        step = multi_axis_attention(q[:, :, t : t + 1], k, v, spec, start=t, summaries=summaries)
        assert (step - whole[:, :, t : t + 1]).abs().max() < 1e-5


def test_equal_scores_choose_the_older_block_everywhere(selected):
    q, k, v = qkv(queries=64)
    # Every block holds the same keys, so every score ties, exactly because small integers are added without rounding.
    q, k = q.round(), k[:, :, :4].round().repeat(1, 1, 16, 1)
    spec = AxisSpec(4, 2, 3, None)
    expected, weights, _ = multi_axis_attention_reference(q, k, v, spec, scaling=1.0)
    assert (attention._tile_attention(q, k, v, spec, 0, 1.0, None, None, None) - expected).abs().max() < 1e-12
    summaries = summarize_blocks(k, v, spec)
    step = multi_axis_attention(q[:, :, 50:51], k, v, spec, start=50, scaling=1.0, summaries=summaries)
    assert (step - expected[:, :, 50:51]).abs().max() < 1e-12
    spread = weights[0, 0, 60].view(16, 4).std(dim=1)  # a grid slot's weight is even over its block
    assert (spread[:4] > 0).all() and (spread[4:14] < 1e-15).all()


@pytest.mark.parametrize("length", [29, 64, 97])
def test_the_future_changes_nothing(length, selected):
    """Bit for bit, or to rounding where later queries are in the same tile."""
    spec = AxisSpec(4, 2, 2, None)
    q, k, v = qkv(queries=length, dtype=torch.float64 if selected == "gathered" else torch.float32)
    before = multi_axis_attention(q, k, v, spec)
    for t in range(0, length - 1, 3):
        future = [torch.cat([x[:, :, : t + 1], 50 * torch.randn_like(x[:, :, t + 1 :])], 2) for x in (q, k, v)]
        gap = (multi_axis_attention(*future, spec)[:, :, : t + 1] - before[:, :, : t + 1]).abs().max()
        assert gap <= (1e-13 if selected == "gathered" else 0)


def test_a_selector_that_pools_its_own_block_leaks(monkeypatch):
    spec, t = AxisSpec(8, 2, 1, None), 50
    q, k, v = qkv(queries=64)
    future = [torch.cat([x[:, :, :t], 50 * torch.randn_like(x[:, :, t:])], 2) for x in (q, k, v)]

    def change():
        outs = [multi_axis_attention_reference(*x, spec)[0][:, :, :t] for x in ((q, k, v), future)]
        return (outs[0] - outs[1]).abs().max()

    assert change() == 0
    per_token = attention._select
    pooled = lambda q, *rest: per_token(q.unflatten(2, (-1, 8)).mean(3).repeat_interleave(8, 2), *rest)  # noqa: E731
    monkeypatch.setattr(attention, "_select", pooled)
    assert change() > 1e-3


def test_dense_while_the_axes_cover_everything():
    b, top = 4, 3
    q, k, v = qkv(queries=90)
    for spec, length in ((AxisSpec(b, 2, top, None), (top + 3) * b), (AxisSpec(b, 2, None, None), 90)):
        short = [x[:, :, :length] for x in (q, k, v)]
        for path in (multi_axis_attention, lambda *args: multi_axis_attention_reference(*args)[0]):
            assert (path(*short, spec) - dense(*short)).abs().max() < 1e-12
        long = multi_axis_attention_reference(q, k, v, spec)[0][:, :, :length]
        assert (long - dense(*short)).abs().max() < 1e-12
    assert (multi_axis_attention(q, k, v, AxisSpec(b, 2, top, None)) - dense(q, k, v)).abs().max() > 1e-3


def test_blocks_of_equal_keys_lose_nothing_on_the_grid():
    q, k, v = qkv(queries=96)
    k = k[:, :, ::8].repeat_interleave(8, 2)
    out = multi_axis_attention(q, k, v, AxisSpec(8, 4, 0, None))
    assert (out - dense(q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize("segment", [8, 12, 20, 31])
def test_segments_with_enough_memory_equal_one_pass_and_one_block_less_fails(segment):
    b, memory, length = 4, 6, 96
    spec = AxisSpec(b, 2, 2, memory)
    q, k, v = qkv(queries=length)
    whole = multi_axis_attention(q, k, v, spec)

    def in_segments(kept_blocks):
        outs = []
        for lo in range(0, length, segment):
            hi = min(lo + segment, length)
            origin = max(lo // b - kept_blocks, 1) * b
            part = [torch.cat([x[:, :, : min(b, hi)], x[:, :, origin:hi]], 2) for x in (k, v)]
            outs.append(multi_axis_attention(q[:, :, lo:hi], *part, spec, start=lo - origin + b))
        return torch.cat(outs, 2)

    assert (in_segments(memory) - whole).abs().max() < 1e-12
    assert (in_segments(memory - 1) - whole).abs().max() > 1e-3


def test_every_block_in_sight_gets_a_gradient_through_the_grid(monkeypatch):
    spec = AxisSpec(4, 2, 1, None)
    q, k, v = qkv(queries=80, grad=True)
    out, weights, _ = multi_axis_attention_reference(q, k, v, spec)
    last = attention._tile_attention(q, k, v, spec, 0, None, None, None, None)[:, :, -1].square().sum()
    per_block = torch.autograd.grad(last, k)[0].unflatten(2, (-1, 4)).abs().amax((0, 1, 3, 4))
    assert (per_block > 0).all()

    real = attention._axis_masks
    monkeypatch.setattr(attention, "_axis_masks", lambda *args: (real(*args)[0], torch.zeros_like(real(*args)[1])))
    last = multi_axis_attention_reference(q, k, v, spec)[0][:, :, -1].square().sum()
    per_block = torch.autograd.grad(last, k)[0].unflatten(2, (-1, 4)).abs().amax((0, 1, 3, 4))
    assert (per_block == 0).sum() >= 80 // 4 - 3 - 2  # two key-value heads choose at most one block each


def test_a_query_visits_no_more_keys_than_promised():
    spec, length = AxisSpec(8, 4, 3, 20), 256
    q, k, v = qkv(queries=length)
    tokens, grid = attention._axis_masks(q, length, summarize_blocks(k, v, spec), spec, 0, 1.0)
    assert tokens.sum(-1).max() <= (spec.relevance_top_k + 3) * spec.block_size
    assert (tokens.sum(-1) + grid.sum(-1)).max() <= (spec.relevance_top_k + 3) * 8 + spec.memory_blocks


def test_the_first_block_is_read_from_everywhere():
    spec, length = AxisSpec(4, 2, 1, 3), 120
    q, k, v = qkv(queries=length)
    k[:, :, 1] = 50 * q.mean((0, 1, 2))  # a sink far outside of every window
    out, weights, _ = multi_axis_attention_reference(q, k, v, spec)
    assert (weights[..., :4].sum(-1) > 0).all()
    other = v.clone()
    other[:, :, 1] += 1
    change = multi_axis_attention(q, k, other, spec) - multi_axis_attention(q, k, v, spec)
    assert (change - weights[..., 1:2]).abs().max() < 1e-12


class Allocations(TorchDispatchMode):
    """Records the largest number of elements that an operation's result owns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return results


def test_the_long_path_holds_nothing_quadratic():
    largest = {}
    for length in (2048, 4096):
        q, k, v = qkv(heads=2, hkv=1, queries=length, grad=True, dtype=torch.float32)
        with Allocations() as record:
            multi_axis_attention(q, k, v, AxisSpec(16, 8, 2, None)).sum().backward()
        largest[length] = record.largest
        assert record.largest < length * length / 8
    assert largest[4096] <= 2.2 * largest[2048]
    with Allocations() as record:
        multi_axis_attention_reference(q, k, v, AxisSpec(16, 8, 2, None))
    assert record.largest >= length * length  # the hook does see a quadratic path


def test_a_decoding_step_copies_nothing_as_long_as_the_cache():
    spec, length = AxisSpec(16, 4, 2, None), 8192
    _, k, v = qkv(queries=length, dtype=torch.float32)
    summaries = summarize_blocks(k, v, spec)
    for queries, start in ((1, 8000), (1, torch.tensor([8000])), (4, 8000)):
        q = random(1, 4, queries, 8, dtype=torch.float32)
        with torch.no_grad(), Allocations() as record:
            multi_axis_attention(q, k[:, :, :8100], v[:, :, :8100], spec, start=start, summaries=summaries)
        views = k.numel()  # views of the cache report the storage that they share
        assert record.largest <= views
        with torch.no_grad(), CopiesOnly() as copies:
            multi_axis_attention(q, k[:, :, :8100], v[:, :, :8100], spec, start=start, summaries=summaries)
        assert copies.largest <= 4 * 2 * (length // 4) * queries


class CopiesOnly(Allocations):
    """Counts results that are no views of an input."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.numel())
        return results


def test_a_fully_masked_part_has_no_mass_and_no_gradient(selected):
    spec = AxisSpec(4, 2, 1, None)
    q, k, v = qkv(queries=48, grad=True)
    k_e, v_e, _ = cross_inputs("all", 1, 2, 8, grad=True)
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    alone = multi_axis_attention(q, k, v, spec)
    merged = multi_axis_attention(q, k, v, spec, cross=(k_e, v_e, nothing))
    assert (alone - merged).abs().max() < 1e-13
    for gradient in torch.autograd.grad(merged.sum(), (k_e, v_e)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_finite_and_close(dtype, selected):
    torch.manual_seed(0)
    spec = AxisSpec(8, 4, 2, None)
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(queries=200))
    exact = multi_axis_attention_reference(q.double(), k.double(), v.double(), spec)[0]
    out = multi_axis_attention(q, k, v, spec)
    out.sum().backward()
    assert out.dtype == dtype and all(x.grad.isfinite().all() for x in (q, k, v))
    # A near tie may be decided otherwise than in float64: most outputs agree closely, none is far away.
    assert (out - exact).abs().quantile(0.99) < 2e-2
    step = multi_axis_attention(q[:, :, 150:151], k, v, spec, start=150)
    assert (step - exact[:, :, 150:151]).abs().max() < 2e-2


def test_gradient_checkpointing_recomputes_the_same(selected):
    spec = AxisSpec(4, 2, 2, None)
    inputs = qkv(queries=64, grad=True)
    plain = torch.autograd.grad(multi_axis_attention(*inputs, spec).sum(), inputs)
    again = torch.autograd.grad(checkpoint(multi_axis_attention, *inputs, spec, use_reentrant=False).sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(plain, again))


@pytest.mark.parametrize("queries", [1, 64])
def test_compiled_calls_give_the_same(queries):
    torch._dynamo.reset()
    spec = AxisSpec(4, 2, 2, None)
    q, k, v = qkv(queries=queries, keys=64)
    start, summaries = 64 - queries, summarize_blocks(k, v, spec)

    def call(q, k, v):
        return multi_axis_attention(q, k, v, spec, start=start, summaries=summaries)

    assert (torch.compile(call, backend="eager")(q, k, v) - call(q, k, v)).abs().max() < 1e-12


def test_summaries_cover_whole_blocks_only():
    spec = AxisSpec(4, 2, 2, None)
    _, k, v = qkv(queries=11, dv=6)
    summaries = summarize_blocks(k, v, spec)
    assert isinstance(summaries, BlockSummaries)
    assert [tuple(x.shape[2:]) for x in summaries] == [(2, 8), (2, 6), (4, 8)]
    assert torch.allclose(summaries.keys[:, :, 1], k[:, :, 4:8].mean(2))
    assert torch.allclose(summaries.sub_keys[:, :, 3], k[:, :, 6:8].mean(2))


def test_bad_input_is_refused_in_one_sentence():
    q, k, v = qkv(queries=8)
    spec = AxisSpec(4, 2, 2, None)
    for call, words in (
        (lambda: AxisSpec(block_size=10, sub_block_size=4), "multiple of sub_block_size=4"),
        (lambda: AxisSpec(block_size=0), "block_size=0"),
        (lambda: AxisSpec(memory_blocks=-1), "memory_blocks=-1"),
        (lambda: AxisSpec(relevance_top_k=-2), "relevance_top_k=-2"),
        (lambda: multi_axis_attention(q, k, v[:, :, :7], spec), "do not fit"),
        (lambda: multi_axis_attention(q, k, v, spec, start=1), "as many keys"),
        (lambda: multi_axis_attention(q, k, v, spec, first_query=q[:, :, :7]), "one for each query"),
        (lambda: multi_axis_attention(q, k, v, spec, cross=(k, v, torch.ones(1, 3))), "one entry per row and key"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
