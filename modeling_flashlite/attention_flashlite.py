"""Multi-axis attention: one softmax over a block axis, a relevance axis and a grid axis.

For the query in slot `t`, block `i = t // b`, of a row's key buffer:

- block axis: the keys `max(0, (i-1) b) <= s <= t`, one by one;
- candidates: the complete blocks `max(0, i-W) <= j <= i-2`;
- relevance axis: every key of the `K` candidates with the highest score
  `S_j = max_r relu(m) . kmax_{j,r} - relu(-m) . kmin_{j,r}`, where `m` is the mean query of the key-value head's
  group and `kmax`, `kmin` bound the keys of sub-block `r` (the page bound of Quest, arXiv:2406.10774). The choice is
  made per token and per key-value head, without a gradient; of equal scores the older block wins;
- grid axis: every other candidate as a single slot (mean key, mean value) whose logit is raised by `log b`.

`multi_axis_attention_reference` is the definition; every path of `multi_axis_attention` equals it, outputs and
gradients. Nothing here knows of positions: their encoding changes queries and keys before they come.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_tiles_flashlite import TileAttention, TileSizes, top_blocks


Cross = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class AxisSpec:
    """The sizes that define the three axes.

    Args:
        block_size: tokens in a block (`b`).
        sub_block_size: tokens in a sub-block that has its own key bounds (`c`, a divisor of `b`).
        relevance_top_k: blocks read in full beside the own and the previous one (`K`); `None` reads every candidate.
        memory_blocks: how many blocks back a query sees (`W`); `None` sees all.
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


class BlockSummaries(NamedTuple):
    """Summaries of the first `n` blocks of a key buffer, `r = b / c` sub-blocks each.

    `keys` [B, Hkv, n, dk] and `values` [B, Hkv, n, dv] are block means, `maxima` and `minima` [B, Hkv, n*r, dk] the
    bounds of the keys of each sub-block.
    """

    keys: Tensor
    values: Tensor
    maxima: Tensor
    minima: Tensor


def summarize_blocks(k: Tensor, v: Tensor, spec: AxisSpec) -> BlockSummaries:
    """Summarizes the `S // b` blocks that fit entirely in `k` [B, Hkv, S, dk] and `v` [B, Hkv, S, dv].

    The means are differentiable; the bounds carry no gradient.
    """
    b, c = spec.block_size, spec.sub_block_size
    n = k.shape[2] // b
    k_blocks, v_blocks = (x[:, :, : n * b].unflatten(2, (n, b)) for x in (k, v))
    with torch.no_grad():
        minima, maxima = k[:, :, : n * b].unflatten(2, (n * b // c, c)).aminmax(dim=3)
    return BlockSummaries(k_blocks.mean(3), v_blocks.mean(3), maxima, minima)


def _slots(start: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Slots of the queries, [1 or B, length]."""
    offsets = torch.arange(length, device=device)
    return (start[:, None] if isinstance(start, Tensor) else start) + offsets[None, :]


def _box_scores(q: Tensor, maxima: Tensor, minima: Tensor, sub_blocks: int) -> Tensor:
    """Scores `S_j` [B, Hkv, T, n] of every block for every query and key-value head."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    hkv = maxima.shape[1]
    mean = q.unflatten(1, (hkv, -1)).to(wide).mean(2)
    features = torch.cat([mean.clamp(min=0), mean.clamp(max=0)], dim=-1)
    boxes = torch.cat([maxima, minima], dim=-1).to(wide)
    return (features @ boxes.mT).unflatten(-1, (-1, sub_blocks)).amax(-1)


@torch.no_grad()
def _select(q: Tensor, summaries: BlockSummaries, spec: AxisSpec, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates [1 or B, 1, T, n] and the selected blocks [B, Hkv, T, n] of every query."""
    n, top = summaries.keys.shape[2], spec.relevance_top_k
    i = (slots // spec.block_size)[:, None, :, None]
    j = torch.arange(n, device=q.device)
    candidates = j <= i - 2
    if spec.memory_blocks is not None:
        candidates = candidates & (j >= i - spec.memory_blocks)
    shape = (q.shape[0], summaries.keys.shape[1], q.shape[2], n)
    if top is None or top >= n:
        return candidates, candidates.expand(shape)
    scores = _box_scores(q, summaries.maxima, summaries.minima, spec.block_size // spec.sub_block_size)
    scores = scores.masked_fill(~candidates, -math.inf)
    selected = torch.zeros(shape, dtype=torch.bool, device=q.device).scatter(3, top_blocks(scores, top), True)
    return candidates, selected & candidates


def _axis_masks(q: Tensor, s: int, summaries: BlockSummaries, spec: AxisSpec, start) -> tuple[Tensor, Tensor]:
    """What each query sees: tokens [B, Hkv, T, S] one by one and grid slots [B, Hkv, T, n]."""
    b = spec.block_size
    slots = _slots(start, q.shape[2], q.device)
    candidates, selected = _select(q, summaries, spec, slots)
    t, key = slots[:, None, :, None], torch.arange(s, device=q.device)
    tokens = ((key >= (t // b - 1) * b) & (key <= t)).expand(q.shape[0], selected.shape[1], -1, -1).clone()
    covered = min(s, selected.shape[3] * b)
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
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition of multi-axis attention, with explicit weights.

    Args:
        q: queries [B, H, T, dk].
        k: keys [B, Hkv, S, dk]; slot 0 begins a block.
        v: values [B, Hkv, S, dv].
        spec: the sizes of the axes.
        start: slot of the first query, one `int` or a LongTensor [B]; keys right of a query's slot are never seen.
        scaling: factor of the dot products, `dk ** -0.5` if `None`.
        cross: `(k_e [B, Hkv, Se, dk], v_e [B, Hkv, Se, dv], mask [B, Se] bool or None)`, keys that join the softmax.
        dropout: probability of dropping a weight.

    Returns:
        `(out [B, H, T, dv], weights [B, H, T, S], cross_weights [B, H, T, Se] or None)`. A grid slot's weight is
        spread evenly over the tokens of its block, so that `out = weights @ v + cross_weights @ v_e`.
    """
    _check(q, k, v, start, cross)
    b, groups = spec.block_size, q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    summaries = summarize_blocks(k, v, spec)
    tokens, grid = _axis_masks(q, k.shape[2], summaries, spec, start)
    keys, values, seen = [k, summaries.keys], v, [tokens, grid]
    if cross is not None:
        keys.append(cross[0])
        mask = cross[2] if cross[2] is not None else cross[0].new_ones(cross[0].shape[0], cross[0].shape[2])
        seen.append(mask.bool()[:, None, None, :].expand(-1, k.shape[1], q.shape[2], -1))

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(groups, dim=1)

    logits = (q * scaling).to(wide) @ spread(torch.cat(keys, 2)).to(wide).mT
    n, s = grid.shape[3], k.shape[2]
    logits[..., s : s + n] += math.log(b)
    logits = logits.masked_fill(~spread(torch.cat(seen, 3)), -math.inf)
    weights = F.dropout(logits.softmax(-1), dropout)
    own, mass = weights[..., :s], weights[..., s : s + n]
    own = own + F.pad((mass / b).repeat_interleave(b, dim=3), (0, s - n * b))
    out = own @ spread(values).to(wide)
    cross_weights = None
    if cross is not None:
        cross_weights = weights[..., s + n :]
        out = out + cross_weights @ spread(cross[1]).to(wide)
        cross_weights = cross_weights.to(q.dtype)
    return out.to(v.dtype), own.to(q.dtype), cross_weights


def _check(q: Tensor, k: Tensor, v: Tensor, start: int | Tensor, cross: Cross | None) -> None:
    """Refuses shapes that do not belong together."""
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
    summaries: BlockSummaries | None = None,
) -> Tensor:
    """Multi-axis attention on the quickest path that fits; arguments as in `multi_axis_attention_reference`.

    Args:
        summaries: summaries of the first blocks of `k` and `v`, at least of every candidate of every query; computed
            here if `None`.

    Returns:
        out [B, H, T, dv].
    """
    _check(q, k, v, start, cross)
    return _masked_attention(q, k, v, spec, start, scaling, cross, summaries)


def _masked_attention(q, k, v, spec, start, scaling, cross, summaries) -> Tensor:
    """One dense call on the keys [tokens; grid slots; cross keys] with an additive mask."""
    summaries = summarize_blocks(k, v, spec) if summaries is None else summaries
    tokens, grid = _axis_masks(q, k.shape[2], summaries, spec, start)
    keys, values = [k, summaries.keys.to(k.dtype)], [v, summaries.values.to(v.dtype)]
    bias = torch.zeros(tokens.shape, dtype=q.dtype, device=q.device).masked_fill_(~tokens, -math.inf)
    grid_bias = torch.full(grid.shape, math.log(spec.block_size), dtype=q.dtype, device=q.device)
    bias = [bias, grid_bias.masked_fill_(~grid, -math.inf)]
    if cross is not None:
        keys.append(cross[0])
        values.append(cross[1])
        row = torch.zeros(q.shape[0], cross[0].shape[2], dtype=q.dtype, device=q.device)
        if cross[2] is not None:
            row = row.masked_fill(~cross[2].bool(), -math.inf)
        bias.append(row[:, None, None, :].expand(-1, k.shape[1], q.shape[2], -1))
    groups = q.shape[1] // k.shape[1]
    mask = torch.cat(bias, 3).repeat_interleave(groups, dim=1)
    keys, values = torch.cat(keys, 2), torch.cat(values, 2)
    return F.scaled_dot_product_attention(q, keys, values, mask, scale=scaling, enable_gqa=groups > 1)


def _tile_attention(q, k, v, spec, start, scaling, cross, summaries) -> Tensor:
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
    k_e, v_e, mask = cross if cross is not None else (None, None, None)
    bias = None
    if cross is not None:
        bias = q.new_zeros(q.shape[0], k_e.shape[2])
        bias = bias if mask is None else bias.masked_fill(~mask.bool(), -math.inf)
    return TileAttention.apply(q, k, v, k_e, v_e, bias, starts, tuple(summaries), sizes)
