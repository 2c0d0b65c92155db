"""Multi-axis attention: one softmax over a block axis, the first block, a relevance axis and a grid axis.

For the query in slot `t`, block `i = t // b`, of a row's key buffer:

- block axis: the keys `max(0, (i-1) b) <= s <= t`, one by one;
- first block: the keys `0 <= s < b`, one by one, at any distance: pre-trained models use the first tokens as attention
  sinks (StreamingLLM, arXiv:2309.17453);
- candidates: the complete blocks `max(1, i-W) <= j <= i-2`;
- relevance axis: every key of the `K` candidates with the highest score `S_j = max_g sum_r p_{g,j,r}`, where
  `p_{g,j,r}` is the softmax, over all sub-blocks `r` of all candidates, of the logits of query head `g` of the group
  and the mean key of the sub-block: an estimate of the block's share of attention. It is the maximum over the group
  rather than the sum, so that what one head looks for is not outvoted by others that look everywhere. Blocks are
  selected per token and per key-value head, without a gradient; among equal scores the older block wins;
- grid axis: every other candidate as a single slot (mean key, mean value) with `log b` added to its logit.

`multi_axis_attention_reference` is the definition; every path of `multi_axis_attention` equals it in outputs and
gradients. Positions are encoded in queries and keys by the caller. Where the first block has another position than its
own (just before the window of a query that has left it behind), a second set of queries, `first_query`, attends to its
keys.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_dense_flashlite import causal_attention, query_slots, window_attention
from .attention_parts_flashlite import TileSizes, top_blocks
from .attention_tiles_flashlite import TileAttention

# Up to this many queries, selected blocks are gathered; more queries are processed in tiles.
_FEW_QUERIES = 16
Cross = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class AxisSpec:
    """The sizes that define the three axes.

    Args:
        block_size: tokens in a block (`b`).
        sub_block_size: tokens in a sub-block that has its own mean key (`c`, a divisor of `b`).
        relevance_top_k: blocks read in full in addition to the own, the previous and the first one (`K`); `None` reads
            every candidate.
        memory_blocks: how many blocks back a query sees, apart from the first block (`W`); `None` sees all.
    """

    block_size: int = 64
    sub_block_size: int = 16
    relevance_top_k: int | None = 8
    memory_blocks: int | None = 512

    def __post_init__(self):
        if self.block_size < 1 or self.sub_block_size < 1 or self.block_size % self.sub_block_size:
            raise ValueError(
                f"block_size={self.block_size} is not a positive multiple of sub_block_size={self.sub_block_size}; "
                "choose sub_block_size among the divisors of block_size."
            )
        for name in ("relevance_top_k", "memory_blocks"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} is below 0; use 0 or more, or None for no limit.")

    @property
    def reach(self) -> float:
        """How many blocks back a query attends, in full or on the grid; the first block is always read."""
        return math.inf if self.memory_blocks is None else max(self.memory_blocks, 1)

    def is_dense(self, block: int) -> bool:
        """Whether the queries of a block see every earlier token; always true for the first three blocks."""
        top = math.inf if self.relevance_top_k is None else self.relevance_top_k
        return block <= min(top + 2, self.reach + 1)


class BlockSummaries(NamedTuple):
    """Summaries of the first `n` blocks of a key buffer, `r = b / c` sub-blocks each.

    `keys` [B, Hkv, n, dk] and `values` [B, Hkv, n, dv] are block means, `sub_keys` [B, Hkv, n*r, dk] the mean keys of
    the sub-blocks.
    """

    keys: Tensor
    values: Tensor
    sub_keys: Tensor


def summarize_blocks(k: Tensor, v: Tensor, spec: AxisSpec) -> BlockSummaries:
    """Summarizes the `S // b` blocks that fit entirely in `k` [B, Hkv, S, dk] and `v` [B, Hkv, S, dv].

    Block means are differentiable; sub-block means, which serve the selection only, carry no gradient.
    """
    b, c = spec.block_size, spec.sub_block_size
    n = k.shape[2] // b
    k_blocks, v_blocks = (x[:, :, : n * b].unflatten(2, (n, b)) for x in (k, v))
    sub_keys = k.detach()[:, :, : n * b].unflatten(2, (n * b // c, c)).mean(3)
    return BlockSummaries(k_blocks.mean(3), v_blocks.mean(3), sub_keys)


def _block_shares(q: Tensor, sub_keys: Tensor, candidates: Tensor, sub_blocks: int) -> Tensor:
    """Scores `S_j` [B, Hkv, T, n] of scaled queries [B, Hkv, T, G, dk]; -inf where not of `candidates` [.., T, n]."""
    logits = (q.flatten(2, 3) @ sub_keys.to(q.dtype).mT).unflatten(2, q.shape[2:4])
    seen = candidates.repeat_interleave(sub_blocks, dim=-1)[:, :, :, None]
    shares = logits.masked_fill(~seen, -math.inf).softmax(-1).unflatten(-1, (-1, sub_blocks)).sum(-1).amax(3)
    return shares.masked_fill(~candidates, -math.inf)


@torch.no_grad()
def _select(q: Tensor, summaries: BlockSummaries, spec: AxisSpec, slots: Tensor, scaling: float):
    """The candidates [1 or B, 1, T, n] and the selected blocks [B, Hkv, T, n] of every query."""
    n, top = summaries.keys.shape[2], spec.relevance_top_k
    i = (slots // spec.block_size)[:, None, :, None]
    j = torch.arange(n, device=q.device)
    candidates = (j >= 1) & (j <= i - 2)
    if spec.memory_blocks is not None:
        candidates = candidates & (j >= i - spec.memory_blocks)
    shape = (q.shape[0], summaries.keys.shape[1], q.shape[2], n)
    if top is None or top >= n:
        return candidates, candidates.expand(shape)
    queries = _rows(q, shape[1]).to(torch.promote_types(q.dtype, torch.float32)) * scaling
    scores = _block_shares(queries, summaries.sub_keys, candidates, spec.block_size // spec.sub_block_size)
    selected = torch.zeros(shape, dtype=torch.bool, device=q.device).scatter(3, top_blocks(scores, top), True)
    return candidates, selected & candidates


def _axis_masks(q: Tensor, s: int, summaries: BlockSummaries, spec: AxisSpec, start, scaling: float):
    """Masks of what each query attends to: tokens [B, Hkv, T, S] and grid slots [B, Hkv, T, n]."""
    b = spec.block_size
    slots = query_slots(start, q.shape[2], q.device)
    candidates, selected = _select(q, summaries, spec, slots, scaling)
    t, key = slots[:, None, :, None], torch.arange(s, device=q.device)
    tokens = (((key >= (t // b - 1) * b) | (key < b)) & (key <= t)).expand(q.shape[0], selected.shape[1], -1, -1)
    tokens, covered = tokens.clone(), min(s, selected.shape[3] * b)
    tokens[..., :covered] |= selected.repeat_interleave(b, dim=3)[..., :covered]
    return tokens, candidates & ~selected


def multi_axis_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AxisSpec,
    *,
    start: int | Tensor = 0,
    scaling: float | None = None,
    cross: Cross | None = None,
    first_query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition of multi-axis attention, with explicit weights.

    Args:
        q: queries [B, H, T, dk].
        k: keys [B, Hkv, S, dk]; slot 0 begins a block.
        v: values [B, Hkv, S, dv].
        spec: the sizes of the axes.
        start: slot of the first query, one `int` or a LongTensor [B]; keys after a query's slot are masked.
        scaling: factor of the dot products, `dk ** -0.5` if `None`.
        cross: `(k_e [B, Hkv, Se, dk], v_e [B, Hkv, Se, dv], mask [B, Se] bool or None)`, keys that join the softmax.
        first_query: queries [B, H, T, dk] for the keys of the first block, instead of `q`. They may differ from `q`
            only from the third block on.

    Returns:
        `(out [B, H, T, dv], weights [B, H, T, S], cross_weights [B, H, T, Se] or None)`. A grid slot's weight is
        spread evenly over the tokens of its block, so that `out = weights @ v + cross_weights @ v_e`.
    """
    _check(q, k, v, start, cross, first_query)
    b, groups = spec.block_size, q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    summaries = summarize_blocks(k, v, spec)
    tokens, grid = _axis_masks(q, k.shape[2], summaries, spec, start, scaling)
    keys, values, seen = [k, summaries.keys], v, [tokens, grid]
    if cross is not None:
        keys.append(cross[0])
        mask = cross[2] if cross[2] is not None else cross[0].new_ones(cross[0].shape[0], cross[0].shape[2])
        seen.append(mask.bool()[:, None, None, :].expand(-1, k.shape[1], q.shape[2], -1))

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(groups, dim=1)

    logits = (q * scaling).to(wide) @ spread(torch.cat(keys, 2)).to(wide).mT
    if first_query is not None:
        logits[..., :b] = (first_query * scaling).to(wide) @ spread(k[:, :, :b]).to(wide).mT
    n, s = grid.shape[3], k.shape[2]
    logits[..., s : s + n] += math.log(b)
    logits = logits.masked_fill(~spread(torch.cat(seen, 3)), -math.inf)
    weights = logits.softmax(-1)
    own, mass = weights[..., :s], weights[..., s : s + n]
    own = own + F.pad((mass / b).repeat_interleave(b, dim=3), (0, s - n * b))
    out = own @ spread(values).to(wide)
    cross_weights = None
    if cross is not None:
        cross_weights = weights[..., s + n :]
        out = out + cross_weights @ spread(cross[1]).to(wide)
        cross_weights = cross_weights.to(q.dtype)
    return out.to(v.dtype), own.to(q.dtype), cross_weights


def _check(q: Tensor, k: Tensor, v: Tensor, start: int | Tensor, cross: Cross | None, first_query=None) -> None:
    """Raise `ValueError` for inconsistent shapes."""
    if first_query is not None and first_query.shape != q.shape:
        raise ValueError(
            f"the queries of the first block have shape {tuple(first_query.shape)}, but those of all others "
            f"{tuple(q.shape)}; give one for each query."
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit; expected "
            "[B, H, T, dk], [B, Hkv, S, dk] and [B, Hkv, S, dv] with H a multiple of Hkv."
        )
    if isinstance(start, int) and not 0 <= start <= k.shape[2] - q.shape[2]:
        raise ValueError(
            f"queries in slots {start} to {start + q.shape[2] - 1} need as many keys, but there are {k.shape[2]}; "
            "write the new keys into the buffer first."
        )
    if cross is not None and cross[2] is not None and cross[2].shape != (q.shape[0], cross[0].shape[2]):
        raise ValueError(
            f"the mask of the cross keys has shape {tuple(cross[2].shape)}, expected "
            f"{(q.shape[0], cross[0].shape[2])}; give one entry per row and key."
        )


def multi_axis_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AxisSpec,
    *,
    start: int | Tensor = 0,
    scaling: float | None = None,
    cross: Cross | None = None,
    first_query: Tensor | None = None,
    summaries: BlockSummaries | None = None,
) -> Tensor:
    """Multi-axis attention on the fastest path that applies; arguments as in `multi_axis_attention_reference`.

    Args:
        summaries: summaries of the first blocks of `k` and `v`, at least of every candidate of every query; computed
            here if `None`.

    Returns:
        out [B, H, T, dv].
    """
    _check(q, k, v, start, cross, first_query)
    b, length = spec.block_size, q.shape[2]
    starts = start.tolist() if isinstance(start, Tensor) else [start]
    low, high = min(starts), max(starts)
    start = low if low == high else start
    newest = (high + length - 1) // b
    top = math.inf if spec.relevance_top_k is None else spec.relevance_top_k
    if first_query is None and spec.is_dense(newest):
        return causal_attention(q, k, v, start, scaling, cross)
    if top >= min(spec.reach, newest) - 1:
        return window_attention(q, k, v, b, int(min(spec.reach, newest)), start, scaling, cross, first_query)
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        summaries = None
    if length <= _FEW_QUERIES:
        return _step_attention(q, k, v, spec, start, scaling, cross, first_query, summaries)
    # as a decorator it would import the compiler, which takes a second, for eager calls too
    tiles = torch.compiler.disable(_tile_attention) if torch.compiler.is_compiling() else _tile_attention
    return tiles(q, k, v, spec, start, scaling, cross, first_query, summaries)


def _rows(q: Tensor, hkv: int) -> Tensor:
    """[B, H, T, d] as [B, Hkv, T, G, d]."""
    return q.unflatten(1, (hkv, -1)).transpose(2, 3)


def _take_blocks(k: Tensor, v: Tensor, index: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The blocks `index` [B, Hkv, M] of k and v [B, Hkv, S, d], as [B, Hkv, M b, d]."""
    batch, hkv = k.shape[:2]
    if (
        torch.is_grad_enabled()
        and (k.requires_grad or v.requires_grad)
        or not (is_block_table(k, b) and is_block_table(v, b))
    ):
        rows, heads = (torch.arange(n, device=k.device) for n in (batch, hkv))
        place = rows[:, None, None], heads[None, :, None], index
        k, v = (x[:, :, : x.shape[2] // b * b].unflatten(2, (-1, b))[place].flatten(2, 3) for x in (k, v))
        return k, v
    taken, heads = [], torch.arange(batch * hkv, device=k.device)[:, None]
    for x in (k, v):
        table, step = block_table(x, b)
        lines = (index.view(batch * hkv, -1) + heads * step).view(-1)
        taken.append(table.index_select(0, lines).view(batch, hkv, -1, x.shape[3]))
    return taken[0], taken[1]


def block_table(x: Tensor, b: int) -> tuple[Tensor, int]:
    """A view of all blocks of all heads of x [B, Hkv, S, d] as rows of one matrix, and the number of rows per head.

    `index_select` copies whole rows of it.
    """
    heads, size = x.shape[:2].numel(), b * x.shape[3]
    step = x.stride(1 if x.shape[1] > 1 else 0) // size if heads > 1 else 0
    return x.as_strided(((heads - 1) * step + x.shape[2] // b, size), (size, 1)), step


def is_block_table(x: Tensor, b: int) -> bool:
    """Whether the blocks of all heads of x [B, Hkv, S, d] are rows of one matrix, at even distances."""
    (batch, hkv, _, d), (by_row, by_head, by_token, by_value) = x.shape, x.stride()
    if (by_token, by_value) != (d, 1) or (batch > 1 and hkv > 1 and by_row != hkv * by_head):
        return False
    # A stride of 0 is an expanded dimension: its heads share rows.
    return all(size == 1 or (step > 0 and step % (b * d) == 0) for size, step in ((hkv, by_head), (batch, by_row)))


def _local_keys(k: Tensor, v: Tensor, start: int | Tensor, length: int, b: int):
    """Keys and values of the queries' own and previous blocks, and a mask of those each query sees [B, T, N]."""
    if isinstance(start, int):
        origin = max(start // b - 1, 0) * b
        k, v = k[:, :, origin : start + length], v[:, :, origin : start + length]
        if length == 1:
            return k, v, None
        slots, keys = query_slots(start, length, k.device), torch.arange(origin, start + length, device=k.device)[None]
    else:
        slots = query_slots(start, length, k.device)
        keys = (start // b - 1)[:, None] * b + torch.arange(2 * b + length - 1, device=k.device)
        place = keys.clamp(0, k.shape[2] - 1)[:, None, :, None]
        k, v = (x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
    slots, keys = slots[:, :, None], keys[:, None, :]
    return k, v, (keys >= (slots // b - 1).clamp(min=0) * b) & (keys <= slots)


def _step_attention(q, k, v, spec, start, scaling, cross, first_query, summaries) -> Tensor:
    """Few queries, as in decoding: only the selected blocks are gathered, everything else is read in place."""
    b, top, length, hkv = spec.block_size, spec.relevance_top_k, q.shape[2], k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    summaries = summarize_blocks(k, v, spec) if summaries is None else summaries
    starts = [start] if isinstance(start, int) else start.tolist()
    first = 1 if spec.memory_blocks is None else max(min(starts) // b - spec.memory_blocks, 1)
    end, r = (max(starts) + length - 1) // b - 1, b // spec.sub_block_size
    k_mean, v_mean = (x[:, :, first:end].to(wide) for x in (summaries.keys, summaries.values))

    blocks = (query_slots(start, length, q.device) // b)[:, None, :, None]
    j = torch.arange(first, end, device=q.device)
    candidates = j <= blocks - 2
    if spec.memory_blocks is not None:
        candidates = candidates & (j >= blocks - spec.memory_blocks)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    queries = _rows(q, hkv).to(wide) * scaling
    with torch.no_grad():
        scores = _block_shares(queries, summaries.sub_keys[:, :, first * r : end * r], candidates, r)
        chosen = top_blocks(scores, top)

    def part(queries: Tensor, keys: Tensor, seen: Tensor | None) -> Tensor:
        logits = (queries.flatten(2, 3) @ keys.to(wide).mT).unflatten(2, (length, -1))
        return logits if seen is None else logits.masked_fill(~seen, -math.inf)

    k_local, v_local, seen = _local_keys(k, v, start, length, b)
    picked = _take_blocks(k, v, (chosen + first).flatten(2), b)
    picked_k, picked_v = (x.to(wide).unflatten(2, (length, -1)) for x in picked)
    unseen = ~candidates.expand(scores.shape).gather(3, chosen).repeat_interleave(b, dim=3)
    relevance = (queries @ picked_k.mT).masked_fill(unseen[:, :, :, None], -math.inf)
    grid = part(queries, k_mean, candidates[:, :, :, None]) + math.log(b)
    grid = grid.scatter(4, chosen[:, :, :, None].expand(-1, -1, -1, grid.shape[3], -1), -math.inf)
    others = queries if first_query is None else _rows(first_query, hkv).to(wide) * scaling
    # for the first two blocks of a row, the first block is on the block axis
    begin = part(others, k[:, :, :b], (blocks >= 2)[:, :, :, None])
    local = part(queries, k_local, None if seen is None else seen[:, None, :, None])
    logits, values = [relevance, begin, local, grid], [v[:, :, :b], v_local, v_mean]
    if cross is not None:
        logits.append(part(queries, cross[0], None if cross[2] is None else cross[2].bool()[:, None, None, None]))
        values.append(cross[1])
    widths = [x.shape[4] for x in logits]
    relevance, *weights = torch.cat(logits, 4).softmax(4).split(widths, 4)
    out = relevance @ picked_v
    for weight, value in zip(weights, values):
        out = out + (weight.flatten(2, 3) @ value.to(wide)).view_as(out)
    return out.transpose(2, 3).flatten(1, 2).to(v.dtype)


def _tile_attention(q, k, v, spec, start, scaling, cross, first_query, summaries) -> Tensor:
    """Tiles merged by log-sum-exp; needs `memory_blocks` to exceed `relevance_top_k` by more than one block."""
    if summaries is None or k.requires_grad or v.requires_grad:
        with torch.no_grad():
            summaries = summarize_blocks(k, v, spec)
    sizes = TileSizes(
        spec.block_size,
        spec.block_size // spec.sub_block_size,
        spec.relevance_top_k,
        spec.memory_blocks or 0,
        q.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    starts = start.tolist() if isinstance(start, Tensor) else [start] * q.shape[0]
    k_e = v_e = bias = None
    if cross is not None:
        k_e, v_e, mask = cross
        bias = q.new_zeros(q.shape[0], k_e.shape[2])
        bias = bias if mask is None else bias.masked_fill(~mask.bool(), -math.inf)
    return TileAttention.apply(q, first_query, k, v, k_e, v_e, bias, starts, tuple(summaries), sizes)
