"""The long path of multi-axis attention: tiles merged by log-sum-exp, with the exact joint gradient.

The softmax over a query's keys is split into parts with contiguous keys: the block axis, the first
block, one part per selected block, the grid axis, the encoder keys. Each part gives an output `o_p` and a log-sum-exp
`l_p`; with `l = logsumexp_p l_p` the whole is `sum_p exp(l_p - l) o_p`. The queries that selected a block are gathered
into one tile, so that no key is copied and no L x L matrix is formed. The backward pass of a part needs only `P =
exp(s - l)` and `D = do . o`: given the merged output and log-sum-exp, it computes the part's share of the joint
gradient.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat_flashlite import private_operator

# Elements of the buffer that holds the outputs of all parts of a chunk of queries, and queries scored at once.
_PART_ELEMENTS = 1 << 24
_SCORED_QUERIES = 512

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

    def first_sparse_slot(self) -> int:
        """Queries before this slot see every earlier token."""
        return (self.top + 3) * self.block


class _Head(NamedTuple):
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


def _heads_view(x: Tensor) -> Tensor:
    """[T, G, d] as [1, G, T, d]."""
    return x.transpose(0, 1)[None]


def _shared(x: Tensor, groups: int) -> Tensor:
    """[C, d] as [1, G, C, d], without a copy."""
    return x.expand(1, groups, *x.shape)


def _local_pieces(lo: int, hi: int, start: int, b: int):
    """Cuts the queries lo..hi at block boundaries into `(lo, hi, blocks)`; partial blocks have 0 `blocks`."""
    first = min(hi, lo + -(start + lo) % b)
    last = max(first, hi - (start + hi) % b)
    pieces = [(lo, first, 0), (first, last, (last - first) // b), (last, hi, 0)]
    return [piece for piece in pieces if piece[0] < piece[1]]


def _local_operands(head: _Head, piece, b: int, bias: Tensor):
    """Queries, keys, values and bias of a piece: every query sees its own block up to itself and the block before.

    `bias` [G b, 2 b] holds rows in the order (token, group).
    """
    lo, hi, blocks = piece
    groups, slot = head.q.shape[1], head.start + lo
    origin = (slot // b - 1) * b
    if blocks:
        # Windows of two blocks overlap by one, so a strided view needs no copy.
        k, v = (
            x.as_strided((blocks, 1, 2 * b, x.shape[1]), (b * x.stride(0), 0, *x.stride()), _offset(x, origin))
            for x in (head.k, head.v)
        )
        return blocks, k, v, bias
    first, end = slot % b, origin + b + slot % b + hi - lo
    k, v = (x[origin:end][None, None] for x in (head.k, head.v))
    return 1, k, v, bias[first * groups : (first + hi - lo) * groups, : end - origin]


def _offset(x: Tensor, row: int) -> int:
    return int(x.storage_offset()) + row * x.stride(0)


def _local_bias(b: int, groups: int, like: Tensor) -> Tensor:
    t = torch.arange(b, device=like.device)
    bias = torch.zeros(b, 2 * b, dtype=like.dtype, device=like.device)
    bias[:, b:].masked_fill_(t[None, :] > t[:, None], -math.inf)
    return bias.repeat_interleave(groups, dim=0)


def _causal_bias(head: _Head, hi: int) -> Tensor:
    """Additive causal mask of the queries 0..hi over the keys up to the last of them."""
    bias = head.q.new_zeros(hi, head.start + hi)
    return bias.masked_fill_(torch.ones_like(bias, dtype=torch.bool).triu_(head.start + 1), -math.inf)


def _hide_others(x: Tensor, lo: int, first: int, start: int, sizes: TileSizes, columns: int = 1) -> None:
    """Sets non-candidates of the queries (rows of x [R, ..], from `lo`) to -inf; `columns` for each block."""
    b, rows = sizes.block, x.shape[0]
    for block in range((start + lo) // b, (start + lo + rows - 1) // b + 1):
        mine = x[max(block * b - start - lo, 0) : (block + 1) * b - start - lo]
        mine[..., (block - 1 - first) * columns :] = -math.inf
        if sizes.memory:
            mine[..., : max(block - sizes.memory - first, 0) * columns] = -math.inf


def _candidate_range(lo: int, hi: int, start: int, sizes: TileSizes) -> tuple[int, int]:
    """The blocks that are candidates of any of the queries lo..hi."""
    first = max((start + lo) // sizes.block - sizes.memory, 1) if sizes.memory else 1
    return first, (start + hi - 1) // sizes.block - 1


def _scored_chunks(lo: int, hi: int):
    return [(t, min(t + _SCORED_QUERIES, hi)) for t in range(lo, hi, _SCORED_QUERIES)]


def _choose(head: _Head, lo: int, hi: int, sub_keys: Tensor, sizes: TileSizes) -> Tensor:
    """Selected blocks [R, K] of the queries lo..hi, given the mean keys of all sub-blocks [n r, dk]."""
    first, end = _candidate_range(lo, hi, head.start, sizes)
    (rows, groups, dim), r = head.q[lo:hi].shape, sizes.sub_blocks
    logits = (head.q[lo:hi].view(-1, dim) * sizes.scale) @ sub_keys[first * r : end * r].T
    logits = logits.view(rows, groups, -1)
    _hide_others(logits, lo, first, head.start, sizes, r)
    shares = logits.softmax(2).sum(1)
    shares = shares if r == 1 else shares.view(rows, -1, r).sum(2)
    _hide_others(shares, lo, first, head.start, sizes)
    return top_blocks(shares, sizes.top) + first


def _grid_bias(head: _Head, chosen: Tensor, lo: int, sizes: TileSizes) -> tuple[int, int, Tensor]:
    """Additive bias [R, n] of the grid slots `first..end`: log b for a candidate that was not chosen."""
    first, end = _candidate_range(lo, lo + chosen.shape[0], head.start, sizes)
    bias = head.q.new_full((chosen.shape[0], end - first), math.log(sizes.block))
    _hide_others(bias, lo, first, head.start, sizes)
    return first, end, bias.scatter_(1, chosen - first, -math.inf)


def _pairs_by_block(chosen: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Sorts the (query, block) pairs [T, K] by block; returns the order, the distinct blocks and their counts."""
    blocks, order = chosen.reshape(-1).sort(stable=True)
    which, counts = blocks.unique_consecutive(return_counts=True)
    return order, which.tolist(), counts.tolist()


def _blocks(x: Tensor, b: int) -> tuple[Tensor, ...]:
    """The whole blocks of x [S, d], each as [1, 1, b, d]."""
    return x[: x.shape[0] // b * b].view(-1, 1, 1, b, x.shape[1]).unbind(0)


def _head_forward(head: _Head, sub_keys: Tensor, sizes: TileSizes, buffer: Tensor, out: Tensor, lse: Tensor, chosen):
    """Fills out [T, G, dv], lse [T, G] and chosen [T, K] of one head."""
    t_count, groups, _ = head.q.shape
    dense = min(max(sizes.first_sparse_slot() - head.start, 0), t_count)
    if dense:
        _dense_prefix(head, dense, sizes, out, lse)
    if dense == t_count:
        return
    parts = sizes.top + 3 + (head.cross is not None)
    chunk = -(-(t_count - dense) // -(-(t_count - dense) * parts * groups // buffer.shape[0]))
    bias = _local_bias(sizes.block, groups, head.q)
    for lo in range(dense, t_count, chunk):
        hi = min(lo + chunk, t_count)
        rows = hi - lo
        view = buffer[: parts * groups * rows]
        logs = view.new_empty(parts, rows, groups)
        _forward_local(head, lo, hi, sizes, bias, view[: rows * groups], logs[0])
        slots = view[rows * groups : 2 * rows * groups].view(rows, groups, -1)
        for a, z in _scored_chunks(lo, hi):
            if sizes.top:
                chosen[a:z] = _choose(head, a, z, sub_keys, sizes)
            _forward_grid(head, a, z, chosen[a:z].long(), sizes, slots[a - lo : z - lo], logs[1, a - lo : z - lo])
        begin = view[2 * rows * groups : 3 * rows * groups].view(rows, groups, -1)
        _forward_first(head, lo, hi, sizes, begin, logs[2])
        if head.cross is not None:
            there = slice(-rows * groups, None)
            _forward_cross(head, lo, hi, sizes, view[there].view(rows, groups, -1), logs[-1])
        where = _forward_pairs(head, lo, chosen[lo:hi], sizes, view, logs)
        _merge(view, logs, where, out[lo:hi], lse[lo:hi])


def _dense_prefix(head: _Head, hi: int, sizes: TileSizes, out: Tensor, lse: Tensor) -> None:
    """The queries 0..hi, which see every earlier token (and the encoder keys)."""
    k, v, bias = _prefix_operands(head, hi)
    groups = head.q.shape[1]
    q, k, v = _heads_view(head.q[:hi]), _shared(k, groups), _shared(v, groups)
    o, logs = tile_forward(q, k, v, bias, sizes.scale, causal=bias is None)
    out[:hi], lse[:hi] = o[0, ..., : out.shape[2]].transpose(0, 1), logs[0].T


def _prefix_operands(head: _Head, hi: int):
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


def _forward_local(head: _Head, lo: int, hi: int, sizes: TileSizes, bias: Tensor, out: Tensor, logs: Tensor) -> None:
    for piece in _local_pieces(lo, hi, head.start, sizes.block):
        n, k, v, mask = _local_operands(head, piece, sizes.block, bias)
        q = head.q[piece[0] : piece[1]].reshape(n, 1, -1, head.q.shape[2])
        o, log = tile_forward(q, k, v, mask[None, None], sizes.scale)
        groups = head.q.shape[1]
        rows = (piece[1] - piece[0]) * groups
        out[(piece[0] - lo) * groups :][:rows] = o.view(rows, -1)[:, : out.shape[1]]
        logs[piece[0] - lo : piece[1] - lo] = log.reshape(-1, groups)


def _forward_grid(head: _Head, lo: int, hi: int, chosen: Tensor, sizes: TileSizes, out: Tensor, logs: Tensor) -> None:
    groups = head.q.shape[1]
    first, end, bias = _grid_bias(head, chosen[:, : sizes.top], lo, sizes)
    k, v = _shared(head.k_mean[first:end], groups), _shared(head.v_mean[first:end], groups)
    o, log = tile_forward(_heads_view(head.q[lo:hi]), k, v, bias[None, None], sizes.scale)
    out.copy_(o[0, ..., : out.shape[2]].transpose(0, 1))
    logs.copy_(log[0].T)


def _forward_first(head: _Head, lo: int, hi: int, sizes: TileSizes, out: Tensor, logs: Tensor) -> None:
    groups = head.q.shape[1]
    k, v = _shared(head.k[: sizes.block], groups), _shared(head.v[: sizes.block], groups)
    o, log = tile_forward(_heads_view(head.first[lo:hi]), k, v, None, sizes.scale)
    out.copy_(o[0, ..., : out.shape[2]].transpose(0, 1))
    logs.copy_(log[0].T)


def _forward_cross(head: _Head, lo: int, hi: int, sizes: TileSizes, out: Tensor, logs: Tensor) -> None:
    """The encoder keys. In a fully masked row the operator's log-sum-exp is undefined, and the part gets no mass."""
    if head.cross is None or not (head.cross[2] > -math.inf).any():
        out.zero_()
        logs.fill_(-math.inf)
        return
    (k, v, bias), groups = head.cross, head.q.shape[1]
    k, v = _shared(k, groups), _shared(v, groups)
    o, log = tile_forward(_heads_view(head.q[lo:hi]), k, v, bias.expand(1, 1, hi - lo, -1), sizes.scale)
    out.copy_(o[0, ..., : out.shape[2]].transpose(0, 1))
    logs.copy_(log[0].T)


def _forward_pairs(head: _Head, lo: int, chosen: Tensor, sizes: TileSizes, buffer: Tensor, logs: Tensor) -> Tensor:
    """One tile per selected block, with the queries that selected it.

    Returns where in the buffer, counted in rows of G, the part (query, rank) went [R, K].
    """
    rows, groups, dim = chosen.shape[0], head.q.shape[1], head.q.shape[2]
    if not sizes.top:
        return torch.empty(rows, 0, dtype=torch.long, device=buffer.device)
    q = head.q[lo : lo + rows].view(rows, -1)
    order, blocks, counts = _pairs_by_block(chosen)
    keys, values = _blocks(head.k, sizes.block), _blocks(head.v, sizes.block)
    outs = buffer[3 * rows * groups :][: order.shape[0] * groups].split([groups * count for count in counts])
    pair_logs = []
    for block, queries, out in zip(blocks, (order // sizes.top).split(counts), outs):
        picked = q.index_select(0, queries).view(1, 1, -1, dim)
        o, log = tile_forward(picked, keys[block], values[block], None, sizes.scale)
        out.copy_(o[0, 0, :, : out.shape[1]])
        pair_logs.append(log.view(-1, groups))
    where = torch.empty_like(order)
    where[order] = torch.arange(order.shape[0], device=order.device)
    ranks = torch.cat(pair_logs).index_select(0, where).view(rows, sizes.top, groups)
    logs[3 : 3 + sizes.top] = ranks.transpose(0, 1)
    return where.view(rows, sizes.top)


def _merge(buffer: Tensor, logs: Tensor, where: Tensor, out: Tensor, lse: Tensor) -> None:
    """Sums the parts of every query with their weights into out [R, G, dv] and lse [R, G].

    The buffer holds rows in the order: block axis, grid axis, first block, pairs (at `where`), encoder keys.
    """
    parts, rows, groups = logs.shape
    device = buffer.device
    total = logs.logsumexp(0)
    weights = (logs - total).exp_().permute(1, 2, 0).reshape(rows * groups, parts)
    index = torch.arange(rows, device=device)[:, None]
    columns = [index, index + rows, index + 2 * rows, where + 3 * rows]
    if parts > where.shape[1] + 3:
        columns.append(index + rows * (parts - 1))
    index = (torch.cat(columns, 1)[:, None, :] * groups + torch.arange(groups, device=device)[:, None]).flatten(0, 1)
    merged = F.embedding_bag(index, buffer, per_sample_weights=weights, mode="sum")
    out.copy_(merged.view(rows, groups, -1))
    lse.copy_(total)


class _Grads(NamedTuple):
    """Buffers for the gradients of a head: q, `first`, k, v, the means, and the encoder keys and values."""

    q: Tensor
    first: Tensor
    k: Tensor
    v: Tensor
    k_mean: Tensor
    v_mean: Tensor
    cross: tuple[Tensor, Tensor] | None


def _head_backward(head: _Head, sizes: TileSizes, out, lse, chosen, grad: Tensor, grads: _Grads) -> None:
    """Adds the gradients of one head; out, grad [T, G, dv], lse [T, G], chosen [T, K]."""
    t_count = head.q.shape[0]
    dense = min(max(sizes.first_sparse_slot() - head.start, 0), t_count)
    if dense:
        k, v, bias = _prefix_operands(head, dense)
        gk, gv = _backward_shared(head, 0, dense, k, v, bias, sizes, out, lse, grad, grads.q, causal=bias is None)
        end = head.start + dense
        grads.k[:end] += gk[:end]
        grads.v[:end] += gv[:end]
        if grads.cross is not None:
            grads.cross[0].add_(gk[end:])
            grads.cross[1].add_(gv[end:])
    if dense == t_count:
        return
    _backward_local(head, dense, t_count, sizes, out, lse, grad, grads)
    k, v, others = head.k[: sizes.block], head.v[: sizes.block], head._replace(q=head.first)
    gk, gv = _backward_shared(others, dense, t_count, k, v, None, sizes, out, lse, grad, grads.first)
    grads.k[: sizes.block] += gk
    grads.v[: sizes.block] += gv
    for lo, hi in _scored_chunks(dense, t_count):
        first, end, bias = _grid_bias(head, chosen[lo:hi].long(), lo, sizes)
        k, v = head.k_mean[first:end], head.v_mean[first:end]
        gk, gv = _backward_shared(head, lo, hi, k, v, bias[None, None], sizes, out, lse, grad, grads.q)
        grads.k_mean[first:end] += gk
        grads.v_mean[first:end] += gv
        if head.cross is not None and grads.cross is not None and (head.cross[2] > -math.inf).any():
            k, v, bias = head.cross
            bias = bias.expand(1, 1, hi - lo, -1)
            gk, gv = _backward_shared(head, lo, hi, k, v, bias, sizes, out, lse, grad, grads.q)
            grads.cross[0].add_(gk)
            grads.cross[1].add_(gv)
    if sizes.top:
        _backward_pairs(head, dense, sizes, out, lse, chosen, grad, grads)


def _backward_shared(head, lo, hi, k, v, bias, sizes, out, lse, grad, grad_q, causal=False) -> tuple[Tensor, Tensor]:
    """Backward of the queries lo..hi against one set of keys; adds to grad_q, returns the gradients of k and v."""
    groups = head.q.shape[1]
    q, o, g = (_heads_view(x[lo:hi]) for x in (head.q, out, grad))
    k, v = _shared(k, groups), _shared(v, groups)
    gq, gk, gv = tile_backward(g, q, k, v, bias, o, lse[lo:hi].T[None], sizes.scale, causal)
    grad_q[lo:hi] += gq[0].transpose(0, 1)
    return gk[0].sum(0), gv[0].sum(0)


def _backward_local(head: _Head, lo: int, hi: int, sizes: TileSizes, out, lse, grad, grads: _Grads) -> None:
    b = sizes.block
    bias = _local_bias(b, head.q.shape[1], head.q)
    for piece in _local_pieces(lo, hi, head.start, b):
        a, z, blocks = piece
        n, k, v, mask = _local_operands(head, piece, b, bias)
        q, o, g = (x[a:z].reshape(n, 1, -1, x.shape[2]) for x in (head.q, out, grad))
        gq, gk, gv = tile_backward(g, q, k, v, mask[None, None], o, lse[a:z].reshape(n, 1, -1), sizes.scale)
        grads.q[a:z] += gq.reshape(z - a, -1, q.shape[-1])
        origin = ((head.start + a) // b - 1) * b
        for into, part in ((grads.k, gk), (grads.v, gv)):
            if blocks:
                into[origin : origin + blocks * b] += part[:, 0, :b].reshape(-1, part.shape[-1])
                into[origin + b : origin + (blocks + 1) * b] += part[:, 0, b:].reshape(-1, part.shape[-1])
            else:
                into[origin : origin + part.shape[2]] += part[0, 0]


def _backward_pairs(head: _Head, lo: int, sizes: TileSizes, out, lse, chosen, grad, grads: _Grads) -> None:
    rows, groups = head.q.shape[0] - lo, head.q.shape[1]
    q, o, g, log = (x[lo:].reshape(rows, -1) for x in (head.q, out, grad, lse))
    grad_q = grads.q[lo:].view(rows, -1)
    order, blocks, counts = _pairs_by_block(chosen[lo:])
    keys, values, grad_k, grad_v = (_blocks(x, sizes.block) for x in (head.k, head.v, grads.k, grads.v))
    for block, queries in zip(blocks, (order // sizes.top).split(counts)):
        # Groups are passed as heads, which the operator's backward runs in parallel.
        to_heads = (x.index_select(0, queries).view(-1, groups, x.shape[1] // groups) for x in (g, q, o))
        grad_here, q_here, o_here = map(_heads_view, to_heads)
        logs = log.index_select(0, queries).T[None]
        k, v = (x[block].expand(1, groups, -1, -1) for x in (keys, values))
        gq, gk, gv = tile_backward(grad_here, q_here, k, v, None, o_here, logs, sizes.scale)
        grad_q.index_add_(0, queries, gq[0].transpose(0, 1).reshape(-1, grad_q.shape[1]))
        grad_k[block][0, 0].add_(gk[0].sum(0))
        grad_v[block][0, 0].add_(gv[0].sum(0))


class TileAttention(torch.autograd.Function):
    """`apply(q, first, k, v, cross_k, cross_v, cross_bias, starts, summaries, sizes)` -> out [B, H, T, dv].

    q [B, H, T, dk], `first` alike or `None` for q itself, k [B, Hkv, S, dk], v [B, Hkv, S, dv]; cross_bias [B, Se]
    additive; `starts` one int per row; `summaries` of at least the candidate blocks; `sizes` a `TileSizes` whose
    memory exceeds its top-k by more than one block. Low-precision inputs are computed in float32, which is no slower
    on a CPU. Memory beyond inputs and outputs is constant in length, apart from the selection.
    """

    @staticmethod
    def forward(ctx, q, first, k, v, cross_k, cross_v, cross_bias, starts, summaries, sizes):
        batch, heads, length, _ = q.shape
        hkv, groups, dv = k.shape[1], heads // k.shape[1], v.shape[3]
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(batch, length, heads, dv)
        lse = q.new_empty(batch, hkv, length, groups, dtype=wide)
        chosen = torch.zeros(batch, hkv, length, sizes.top, dtype=torch.int32, device=q.device)
        parts = sizes.top + 3 + (cross_k is not None)
        sparse = min(max(length + max(starts) - sizes.first_sparse_slot(), 0), length)
        rows = parts * groups * min(sparse, max(_PART_ELEMENTS // (parts * groups * dv), 2 * sizes.block))
        buffer = q.new_empty(rows, dv, dtype=wide)
        for row in range(batch):
            for h in range(hkv):
                head = _take_head(q, first, k, v, cross_k, cross_v, cross_bias, starts, summaries, row, h, wide)
                sub_keys = summaries[2][row, h].to(wide)
                there = out[row, :, h * groups : (h + 1) * groups]
                _head_forward(head, sub_keys, sizes, buffer, there, lse[row, h], chosen[row, h])
        ctx.save_for_backward(q, first, k, v, cross_k, cross_v, cross_bias, out, lse, chosen, *summaries[:2])
        ctx.starts, ctx.sizes = starts, sizes
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        q, first, k, v, cross_k, cross_v, cross_bias, out, lse, chosen, *means = ctx.saved_tensors
        hkv, groups, b = k.shape[1], q.shape[1] // k.shape[1], ctx.sizes.block
        wide = lse.dtype
        results = [None if x is None else torch.empty_like(x) for x in (q, first, k, v, cross_k, cross_v)]
        for row in range(q.shape[0]):
            for h in range(hkv):
                head = _take_head(q, first, k, v, cross_k, cross_v, cross_bias, ctx.starts, means, row, h, wide)
                mine = slice(h * groups, (h + 1) * groups)
                o = _op_width(out[row, :, mine].to(wide), head.v)
                g = _op_width(grad_out[row, mine].transpose(0, 1).to(wide), head.v)
                cross = head.cross and (torch.zeros_like(head.cross[0]), torch.zeros_like(head.cross[1]))
                grad_q = torch.zeros_like(head.q)
                grad_first = grad_q if first is None else torch.zeros_like(grad_q)
                grads = _Grads(grad_q, grad_first, *map(torch.zeros_like, head[2:6]), cross)
                _head_backward(head, ctx.sizes, o, lse[row, h], chosen[row, h], g, grads)
                n = grads.k_mean.shape[0]
                for own, mean in ((grads.k, grads.k_mean), (grads.v, grads.v_mean)):
                    own[: n * b].unflatten(0, (n, b)).add_(mean.div_(b)[:, None])
                results[0][row, mine] = grad_q.transpose(0, 1)
                if first is not None:
                    results[1][row, mine] = grad_first.transpose(0, 1)
                for result, part in zip(results[2:], (grads.k, grads.v, *(grads.cross or ()))):
                    if result is not None:
                        result[row, h] = part[:, : result.shape[3]]
        return *results, None, None, None, None


def _take_head(
    q, first, k, v, cross_k, cross_v, cross_bias, starts, means, row: int, h: int, wide: torch.dtype
) -> _Head:
    """One key-value head of one row with its group of queries, in the dtype of the computation."""
    groups = q.shape[1] // k.shape[1]
    cross = None
    if cross_k is not None:
        cross_k = cross_k[row, h].to(wide)
        cross = (cross_k, _op_width(cross_v[row, h].to(wide), cross_k), cross_bias[row].to(wide))
    mine = slice(h * groups, (h + 1) * groups)
    own_q, own_first = (None if x is None else x[row, mine].transpose(0, 1).to(wide).contiguous() for x in (q, first))
    k, v, k_mean, v_mean = (x[row, h].to(wide).contiguous() for x in (k, v, means[0], means[1]))
    first = own_q if own_first is None else own_first
    return _Head(own_q, first, k, _op_width(v, k), k_mean, _op_width(v_mean, k), starts[row], cross)


def _op_width(x: Tensor, like: Tensor) -> Tensor:
    """x [..., d], zero-padded to the width of `like` if the CPU operator is available."""
    spare = like.shape[-1] - x.shape[-1]
    return F.pad(x, (0, spare)) if spare > 0 and _has_flash(like, like) else x.contiguous()
