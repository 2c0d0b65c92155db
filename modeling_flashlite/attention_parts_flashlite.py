"""The parts of a query's softmax in the long path of multi-axis attention: their keys, queries, masks and products.

One [`Head`] is a key-value head of one row with its group of queries. A part is a product of some of its queries with
contiguous keys, by PyTorch's CPU operator where there is one; [`tile_forward`] and [`tile_backward`] compute it.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat_flashlite import private_operator

# queries scored at once
_SCORED_QUERIES = 256
# Queries that share gathered blocks: with more, less is copied, and each reads more that it did not select.
_GATHERED_QUERIES = 32
# Keys of a block that make a tile of their own worth its overhead; smaller blocks are gathered.
_TILE_KEYS = 32

_flash: Any = private_operator("aten", "_scaled_dot_product_flash_attention_for_cpu")
_flash_backward: Any = private_operator("aten", "_scaled_dot_product_flash_attention_for_cpu_backward")


def _has_flash(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and _flash is not None and _flash_backward is not None


def tile_forward(q: Tensor, k: Tensor, v: Tensor, bias, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention of q [N, H, R, dk] to k [N, H, C, dk], v [N, H, C, dv] with an additive bias [*, *, R, C] or None.

    Every query must see at least one key. Returns the output [N, H, R, dv] and the log-sum-exp [N, H, R]. The CPU
    operator is private to PyTorch; without it, public operations compute the same.
    """
    if _has_flash(q, v):
        return _flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    logits = _logits(q, k, bias, scale, causal)
    lse = logits.logsumexp(-1)
    return logits.sub_(lse[..., None]).exp_() @ v, lse


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    logits = (q * scale) @ k.mT
    if causal:
        logits.masked_fill_(torch.ones_like(logits, dtype=torch.bool).triu_(1), -math.inf)
    return logits if bias is None else logits.add_(bias)


def tile_backward(grad, q, k, v, bias, out, lse, scale: float, causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for one part of a softmax whose merged output is `out` and log-sum-exp `lse`."""
    if _has_flash(q, v):
        return _flash_backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
    weights = _logits(q, k, bias, scale, causal).sub_(lse[..., None]).exp_()
    grad_logits = (grad @ v.mT).sub_((grad * out).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
    return grad_logits @ k, grad_logits.mT @ q, weights.mT @ grad


def top_blocks(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the `k` highest scores along the last dimension; of equal scores the lower index wins."""
    n = scores.shape[-1]
    if k >= n or k == 0:
        return torch.arange(min(k, n), device=scores.device).expand(*scores.shape[:-1], -1)
    if torch.compiler.is_exporting():
        return scores.topk(k, dim=-1).indices  # ONNX breaks ties this way
    # torch.topk sorts rows of 64 k and more partially, which is faster than its method for slightly shorter rows.
    short = 64 * (k + 1) - n
    padded = F.pad(scores, (0, short), value=-math.inf) if 0 < short < n and scores.numel() > 64 * n else scores
    # The order among ties is unspecified, but only a tie between ranks k and k+1 changes the selected set.
    values, index = padded.topk(k + 1, dim=-1)
    if index.numel() <= 256:  # in decoding, comparing a few numbers in Python is faster than tensor operations
        tied = any(row[k - 1] == row[k] > -math.inf for row in values.view(-1, k + 1).tolist())
    else:
        edge = values[..., k - 1 :]
        tied = bool(((edge[..., 0] == edge[..., 1]) & (edge[..., 1] > -math.inf)).any())
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k] if tied else index.narrow(-1, 0, k)


class TileSizes(NamedTuple):
    """The numbers of a call: block size, sub-blocks per block, top-k, memory blocks (0: no limit), softmax scale."""

    block: int
    sub_blocks: int
    top: int
    memory: int
    scale: float

    @property
    def gathers(self) -> bool:
        """Whether neighbouring queries share one copy of their selected blocks, which is one part of their softmax;
        else every block is a part and a tile of its own, with the queries that selected it."""
        return self.block < _TILE_KEYS and self.top > 0

    def parts(self, cross: bool) -> int:
        """How many parts a query's softmax has: block axis, grid, first block, selected blocks, encoder keys."""
        return 3 + (1 if self.gathers else self.top) + cross

    def first_sparse_slot(self) -> int:
        """Queries before this slot see every earlier token."""
        return (self.top + 3) * self.block


class Head(NamedTuple):
    """One key-value head of one row: q [T, G, dk] in slots from `start`, k [S, dk], v [S, dv] and the summaries.

    `first` [T, G, dk] are the queries for the first block: `q` itself, unless given. Values are zero-padded to the
    width of the keys where that makes the CPU operator applicable, which requires equal widths; results are cut to dv.
    """

    q: Tensor
    first: Tensor
    k: Tensor
    v: Tensor
    k_mean: Tensor
    v_mean: Tensor
    start: int
    cross: tuple[Tensor, Tensor, Tensor] | None


def take_head(
    q, first, k, v, cross_k, cross_v, cross_bias, starts, means, row: int, h: int, wide: torch.dtype
) -> Head:
    """One key-value head of one row with its group of queries, in the dtype of the computation."""
    groups = q.shape[1] // k.shape[1]
    cross = None
    if cross_k is not None:
        cross_k = cross_k[row, h].to(wide)
        cross = (cross_k, op_width(cross_v[row, h].to(wide), cross_k), cross_bias[row].to(wide))
    mine = slice(h * groups, (h + 1) * groups)
    own_q, own_first = (None if x is None else x[row, mine].transpose(0, 1).to(wide).contiguous() for x in (q, first))
    k, v, k_mean, v_mean = (x[row, h].to(wide).contiguous() for x in (k, v, means[0], means[1]))
    first = own_q if own_first is None else own_first
    return Head(own_q, first, k, op_width(v, k), k_mean, op_width(v_mean, k), starts[row], cross)


def op_width(x: Tensor, like: Tensor) -> Tensor:
    """x [..., d], zero-padded to the width of `like` if the CPU operator is available."""
    spare = like.shape[-1] - x.shape[-1]
    return F.pad(x, (0, spare)) if spare > 0 and _has_flash(like, like) else x.contiguous()


def heads_view(x: Tensor) -> Tensor:
    """[T, G, d] as [1, G, T, d]."""
    return x.transpose(0, 1)[None]


def shared(x: Tensor, groups: int) -> Tensor:
    """[C, d] as [1, G, C, d], without a copy."""
    return x.expand(1, groups, *x.shape)


def local_pieces(lo: int, hi: int, start: int, b: int):
    """Cuts the queries lo..hi at block boundaries into `(lo, hi, blocks)`; partial blocks have 0 `blocks`."""
    first = min(hi, lo + -(start + lo) % b)
    last = max(first, hi - (start + hi) % b)
    pieces = [(lo, first, 0), (first, last, (last - first) // b), (last, hi, 0)]
    return [piece for piece in pieces if piece[0] < piece[1]]


def local_operands(head: Head, piece, b: int, bias: Tensor):
    """Queries, keys, values and bias of a piece: every query sees its own block up to itself and the block before.

    `bias` [G b, 2 b] holds rows in the order (token, group).
    """
    lo, hi, blocks = piece
    groups, slot = head.q.shape[1], head.start + lo
    origin = (slot // b - 1) * b
    if blocks:
        # Windows of two blocks overlap by one, so a strided view needs no copy.
        k, v = (
            x[origin:].as_strided((blocks, 1, 2 * b, x.shape[1]), (b * x.stride(0), 0, *x.stride()))
            for x in (head.k, head.v)
        )
        return blocks, k, v, bias
    first, end = slot % b, origin + b + slot % b + hi - lo
    k, v = (x[origin:end][None, None] for x in (head.k, head.v))
    return 1, k, v, bias[first * groups : (first + hi - lo) * groups, : end - origin]


def local_bias(b: int, groups: int, like: Tensor) -> Tensor:
    t = torch.arange(b, device=like.device)
    bias = torch.zeros(b, 2 * b, dtype=like.dtype, device=like.device)
    bias[:, b:].masked_fill_(t[None, :] > t[:, None], -math.inf)
    return bias.repeat_interleave(groups, dim=0)


def prefix_operands(head: Head, hi: int):
    """Keys, values and bias of the queries 0..hi; a bias of `None` is a plain causal mask."""
    end = head.start + hi
    k, v = head.k[:end], head.v[:end]
    if head.start == 0 and head.cross is None:
        return k, v, None
    bias = _causal_bias(head, hi)
    if head.cross is not None:
        k, v = torch.cat([k, head.cross[0]]), torch.cat([v, head.cross[1]])
        bias = torch.cat([bias, head.cross[2].expand(hi, -1)], dim=1)
    return k, v, bias[None, None]


def _causal_bias(head: Head, hi: int) -> Tensor:
    """Additive causal mask of the queries 0..hi over the keys up to the last of them."""
    bias = head.q.new_zeros(hi, head.start + hi)
    return bias.masked_fill_(torch.ones_like(bias, dtype=torch.bool).triu_(head.start + 1), -math.inf)


def _hide_others(x: Tensor, lo: int, first: int, start: int, sizes: TileSizes) -> None:
    """Sets non-candidates of the queries (rows of x [R, .., n], from `lo`) to -inf."""
    b, rows = sizes.block, x.shape[0]
    for block in range((start + lo) // b, (start + lo + rows - 1) // b + 1):
        mine = x[max(block * b - start - lo, 0) : (block + 1) * b - start - lo]
        mine[..., block - 1 - first :] = -math.inf
        if sizes.memory:
            mine[..., : max(block - sizes.memory - first, 0)] = -math.inf


def _candidate_range(lo: int, hi: int, start: int, sizes: TileSizes) -> tuple[int, int]:
    """The blocks that are candidates of any of the queries lo..hi."""
    first = max((start + lo) // sizes.block - sizes.memory, 1) if sizes.memory else 1
    return first, (start + hi - 1) // sizes.block - 1


def scored_chunks(lo: int, hi: int):
    return [(t, min(t + _SCORED_QUERIES, hi)) for t in range(lo, hi, _SCORED_QUERIES)]


def choose(head: Head, lo: int, hi: int, sub_keys: Tensor, sizes: TileSizes) -> Tensor:
    """Selected blocks [R, K] of the queries lo..hi, given the mean keys of all sub-blocks [n r, dk]."""
    first, end = _candidate_range(lo, hi, head.start, sizes)
    (rows, groups, dim), r = head.q[lo:hi].shape, sizes.sub_blocks
    # one slab of columns for each place in a block: sums over contiguous memory
    slabs = sub_keys[first * r : end * r].view(end - first, r, dim).transpose(0, 1).flatten(0, 1)
    logits = ((head.q[lo:hi].view(-1, dim) * sizes.scale) @ slabs.T).view(rows, groups, -1)
    _hide_others(logits.view(rows, groups, r, -1), lo, first, head.start, sizes)
    shares = logits.softmax(2).view(rows, groups, r, -1).sum(2).amax(1)
    _hide_others(shares, lo, first, head.start, sizes)
    return top_blocks(shares, sizes.top) + first


def grid_bias(head: Head, chosen: Tensor, lo: int, sizes: TileSizes) -> tuple[int, int, Tensor]:
    """Additive bias [R, n] of the grid slots `first..end`: log b for a candidate that was not chosen."""
    first, end = _candidate_range(lo, lo + chosen.shape[0], head.start, sizes)
    bias = head.q.new_full((chosen.shape[0], end - first), math.log(sizes.block))
    _hide_others(bias, lo, first, head.start, sizes)
    return first, end, bias.scatter_(1, chosen - first, -math.inf)


def pairs_by_block(chosen: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Sorts the (query, block) pairs [T, K] by block; returns the order, the distinct blocks and their counts."""
    blocks, order = chosen.reshape(-1).sort(stable=True)
    which, counts = blocks.unique_consecutive(return_counts=True)
    return order, which.tolist(), counts.tolist()


def whole_blocks(x: Tensor, b: int) -> Tensor:
    """The whole blocks of x [S, d] as rows [n, b d], without a copy."""
    return x[: x.shape[0] // b * b].view(-1, b * x.shape[1])


def blocks_of(x: Tensor, b: int) -> tuple[Tensor, ...]:
    """The whole blocks of x [S, d], each as [1, 1, b, d]."""
    return whole_blocks(x, b).view(-1, 1, 1, b, x.shape[1]).unbind(0)


def gathered_tiles(head: Head, lo: int, chosen: Tensor, sizes: TileSizes):
    """Cuts the queries from `lo` on, with their selected blocks [R, K], into tiles that share gathered keys.

    Neighbouring queries select much the same blocks. Yields `(lo, hi, blocks [M], keys [M b, dk], values [M b, dv],
    bias [hi - lo, M b])` with every block that one of the queries selected; the bias hides it from the others.
    """
    keys, values = (whole_blocks(x, sizes.block) for x in (head.k, head.v))
    for rows in chosen.split(_GATHERED_QUERIES):
        seen = rows.new_zeros(rows.shape[0], keys.shape[0], dtype=torch.bool).scatter_(1, rows.long(), True)
        blocks = seen.any(0).nonzero().flatten()
        k, v = (x.index_select(0, blocks).view(blocks.shape[0] * sizes.block, -1) for x in (keys, values))
        bias = head.q.new_zeros(rows.shape[0], blocks.shape[0]).masked_fill_(~seen[:, blocks], -math.inf)
        bias = bias[:, :, None].expand(-1, -1, sizes.block).flatten(1)
        yield lo, lo + rows.shape[0], blocks, k, v, bias[None, None]
        lo += rows.shape[0]
