"""Working sets equal multi-axis attention for the tokens of a block."""

import math

import pytest
import torch
from tensors import cross_inputs, first_queries, qkv

from modeling_flashlite.attention_flashlite import (
    AxisSpec,
    BlockSummaries,
    multi_axis_attention,
    multi_axis_attention_reference,
    summarize_blocks,
)
from modeling_flashlite.working_set_flashlite import WorkingSet, fits_working_set


def serve(working, q, k, v, start, scaling, first=None):
    """The output `[B, H, 1, dv]` of a working set for the query `[B, H, 1, dk]` in slot `start`; `first` is of all."""

    def rows(x):
        return (x * scaling).reshape(working.heads, -1, q.shape[3]).to(working.values.dtype)

    others = None if first is None else rows(first[:, :, start : start + 1])
    out = working.attend(rows(q), k[:, :, : start + 1], v[:, :, : start + 1], start, others)
    return out.view(*q.shape[:3], -1).to(v.dtype)


@pytest.mark.parametrize("memory", [None, 7])
@pytest.mark.parametrize("kind", [None, "masked"])
@pytest.mark.parametrize("top", [0, 2])
@torch.no_grad()
def test_a_working_set_serves_the_tokens_of_its_block(memory, kind, top):
    spec, b = AxisSpec(4, 2, top, memory), 4
    q, k, v = qkv(2, queries=60, dv=6)
    cross = cross_inputs(kind, 2, 2, 6, grad=False)
    first = None if memory is None else first_queries(q, spec, 0)[0]
    expected = multi_axis_attention_reference(q, k, v, spec, cross=cross, first_query=first)[0]
    for begin in range((top + 3) * b, 60, b):
        summaries = summarize_blocks(k[:, :, :begin], v[:, :, :begin], spec)
        assert fits_working_set(k, v, spec, begin) and not fits_working_set(k, v, spec, (top + 3) * b - 1)
        working = WorkingSet(k[:, :, : begin + 1], v[:, :, : begin + 1], spec, begin // b, summaries, cross)
        for start in (begin, begin + 1, begin + 3):  # one by one, and past a token that came in a chunk
            out = serve(working, q[:, :, start : start + 1], k, v, start, 8**-0.5, first)
            assert (out - expected[:, :, start : start + 1]).abs().max() < 1e-12


@torch.no_grad()
def test_a_working_set_takes_bounds_and_blocks_wherever_they_lie():
    spec, start = AxisSpec(4, 2, 2, 7), 50
    q, k, v = qkv(2, queries=1, keys=60, dv=6)
    expected = multi_axis_attention_reference(q, k, v, spec, start=start)[0]
    summaries = summarize_blocks(k, v, spec)
    room = BlockSummaries(*(torch.cat([x, torch.full_like(x, math.nan)], -1) for x in summaries))
    narrowed = BlockSummaries(*(x[..., : y.shape[-1]] for x, y in zip(room, summaries)))
    turned = BlockSummaries(*(x.mT.contiguous().mT for x in summaries))
    for mine in (narrowed, turned):
        out = serve(WorkingSet(k, v, spec, start // 4, mine), q, k, v, start, 8**-0.5)
        assert (out - expected).abs().max() < 1e-12
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    # blocks that are not rows of a matrix are gathered for each token
    assert not fits_working_set(*by_token, spec, start) and fits_working_set(k, v, spec, start)
    out = multi_axis_attention(q, *by_token, spec, start=start, summaries=summaries)
    assert (out - expected).abs().max() < 1e-12


@pytest.mark.parametrize("hkv", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_working_set_of_any_number_of_heads_and_type(hkv, dtype):
    spec = AxisSpec(4, 2, 2, None)
    q, k, v = (torch.randn(1, n, 60, 8).to(dtype) for n in (2 * hkv, hkv, hkv))
    expected = multi_axis_attention_reference(q, k, v, spec)[0]
    working = WorkingSet(k, v, spec, 10, summarize_blocks(k, v, spec))
    for start in range(40, 44):
        out = serve(working, q[:, :, start : start + 1], k, v, start, 8**-0.5)
        assert (out - expected[:, :, start : start + 1]).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
