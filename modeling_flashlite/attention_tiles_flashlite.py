"""The long path of multi-axis attention: tiles merged by log-sum-exp, with the exact joint gradient.

The softmax over a query's keys is split into parts with contiguous keys: the block axis, the first
block, the selected blocks, the grid axis, the encoder keys. Each part gives an output `o_p` and a log-sum-exp
`l_p`; with `l = logsumexp_p l_p` the whole is `sum_p exp(l_p - l) o_p`. Large selected blocks are parts of their own:
the queries that selected a block are gathered into one tile, and no key is copied. Small ones are copied, once for all
of some neighbouring queries, and are one part. No L x L matrix is formed. The backward pass of a part needs only `P =
exp(s - l)` and `D = do . o`: given the merged output and log-sum-exp, it computes the part's share of the joint
gradient.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_parts_flashlite import (
    Head,
    TileSizes,
    blocks_of,
    choose,
    gathered_tiles,
    grid_bias,
    heads_view,
    local_bias,
    local_operands,
    local_pieces,
    op_width,
    pairs_by_block,
    prefix_operands,
    scored_chunks,
    shared,
    take_head,
    tile_backward,
    tile_forward,
    whole_blocks,
)

# elements of the buffer that holds the outputs of all parts of a chunk of queries
_PART_ELEMENTS = 1 << 24


def _head_forward(head: Head, sub_keys: Tensor, sizes: TileSizes, buffer: Tensor, out: Tensor, lse: Tensor, chosen):
    """Fills out [T, G, dv], lse [T, G] and chosen [T, K] of one head."""
    t_count, groups, _ = head.q.shape
    dense = min(max(sizes.first_sparse_slot() - head.start, 0), t_count)
    if dense:
        _dense_prefix(head, dense, sizes, out, lse)
    if dense == t_count:
        return
    parts = sizes.parts(head.cross is not None)
    chunk = -(-(t_count - dense) // -(-(t_count - dense) * parts * groups // buffer.shape[0]))
    bias = local_bias(sizes.block, groups, head.q)
    for lo in range(dense, t_count, chunk):
        hi = min(lo + chunk, t_count)
        rows = hi - lo
        view = buffer[: parts * groups * rows]
        logs = view.new_empty(parts, rows, groups)
        _forward_local(head, lo, hi, sizes, bias, view[: rows * groups], logs[0])
        slots = view[rows * groups : 2 * rows * groups].view(rows, groups, -1)
        for a, z in scored_chunks(lo, hi):
            if sizes.top:
                chosen[a:z] = choose(head, a, z, sub_keys, sizes)
            _forward_grid(head, a, z, chosen[a:z].long(), sizes, slots[a - lo : z - lo], logs[1, a - lo : z - lo])
        begin = view[2 * rows * groups : 3 * rows * groups].view(rows, groups, -1)
        _forward_first(head, lo, hi, sizes, begin, logs[2])
        if head.cross is not None:
            there = slice(-rows * groups, None)
            _forward_cross(head, lo, hi, sizes, view[there].view(rows, groups, -1), logs[-1])
        selected = _forward_gathered if sizes.gathers else _forward_pairs
        where = selected(head, lo, chosen[lo:hi], sizes, view, logs)
        _merge(view, logs, where, out[lo:hi], lse[lo:hi])


def _dense_prefix(head: Head, hi: int, sizes: TileSizes, out: Tensor, lse: Tensor) -> None:
    """The queries 0..hi, which see every earlier token (and the encoder keys)."""
    k, v, bias = prefix_operands(head, hi)
    groups = head.q.shape[1]
    q, k, v = heads_view(head.q[:hi]), shared(k, groups), shared(v, groups)
    o, logs = tile_forward(q, k, v, bias, sizes.scale, causal=bias is None)
    out[:hi], lse[:hi] = o[0, ..., : out.shape[2]].transpose(0, 1), logs[0].T


def _forward_local(head: Head, lo: int, hi: int, sizes: TileSizes, bias: Tensor, out: Tensor, logs: Tensor) -> None:
    for piece in local_pieces(lo, hi, head.start, sizes.block):
        n, k, v, mask = local_operands(head, piece, sizes.block, bias)
        q = head.q[piece[0] : piece[1]].reshape(n, 1, -1, head.q.shape[2])
        o, log = tile_forward(q, k, v, mask[None, None], sizes.scale)
        groups = head.q.shape[1]
        rows = (piece[1] - piece[0]) * groups
        out[(piece[0] - lo) * groups :][:rows] = o.view(rows, -1)[:, : out.shape[1]]
        logs[piece[0] - lo : piece[1] - lo] = log.reshape(-1, groups)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sizes: TileSizes, out: Tensor, logs: Tensor) -> None:
    """One part: q [R, G, dk] to k [C, dk] and v [C, dv], shared by the group, into out [R, G, dv] and logs [R, G]."""
    groups = q.shape[1]
    o, log = tile_forward(heads_view(q), shared(k, groups), shared(v, groups), bias, sizes.scale)
    out.copy_(o[0, ..., : out.shape[2]].transpose(0, 1))
    logs.copy_(log[0].T)


def _forward_grid(head: Head, lo: int, hi: int, chosen: Tensor, sizes: TileSizes, out: Tensor, logs: Tensor) -> None:
    first, end, bias = grid_bias(head, chosen[:, : sizes.top], lo, sizes)
    _attend(head.q[lo:hi], head.k_mean[first:end], head.v_mean[first:end], bias[None, None], sizes, out, logs)


def _forward_first(head: Head, lo: int, hi: int, sizes: TileSizes, out: Tensor, logs: Tensor) -> None:
    _attend(head.first[lo:hi], head.k[: sizes.block], head.v[: sizes.block], None, sizes, out, logs)


def _forward_cross(head: Head, lo: int, hi: int, sizes: TileSizes, out: Tensor, logs: Tensor) -> None:
    """The encoder keys. In a fully masked row the operator's log-sum-exp is undefined, and the part gets no mass."""
    if head.cross is None or not (head.cross[2] > -math.inf).any():
        out.zero_()
        logs.fill_(-math.inf)
        return
    k, v, bias = head.cross
    _attend(head.q[lo:hi], k, v, bias.expand(1, 1, hi - lo, -1), sizes, out, logs)


def _forward_gathered(head: Head, lo: int, chosen: Tensor, sizes: TileSizes, buffer: Tensor, logs: Tensor) -> Tensor:
    """The selected blocks as one part. Returns where it is: in the place of the only pair of every query [R, 1]."""
    rows, groups = chosen.shape[0], head.q.shape[1]
    out = buffer[3 * rows * groups : 4 * rows * groups].view(rows, groups, -1)
    for a, z, _, k, v, bias in gathered_tiles(head, lo, chosen, sizes):
        _attend(head.q[a:z], k, v, bias, sizes, out[a - lo : z - lo], logs[3, a - lo : z - lo])
    return torch.arange(rows, device=chosen.device)[:, None]


def _forward_pairs(head: Head, lo: int, chosen: Tensor, sizes: TileSizes, buffer: Tensor, logs: Tensor) -> Tensor:
    """One tile per selected block, with the queries that selected it.

    Returns where in the buffer, counted in rows of G, the part (query, rank) went [R, K].
    """
    rows, groups, dim = chosen.shape[0], head.q.shape[1], head.q.shape[2]
    if not sizes.top:
        return torch.empty(rows, 0, dtype=torch.long, device=buffer.device)
    q = head.q[lo : lo + rows].view(rows, -1)
    order, blocks, counts = pairs_by_block(chosen)
    keys, values = blocks_of(head.k, sizes.block), blocks_of(head.v, sizes.block)
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

    The buffer holds rows in the order: block axis, grid axis, first block, selected (at `where`), encoder keys.
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


def _head_backward(head: Head, sizes: TileSizes, out, lse, chosen, grad: Tensor, grads: _Grads) -> None:
    """Adds the gradients of one head; out, grad [T, G, dv], lse [T, G], chosen [T, K]."""
    t_count = head.q.shape[0]
    dense = min(max(sizes.first_sparse_slot() - head.start, 0), t_count)
    if dense:
        k, v, bias = prefix_operands(head, dense)
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
    for lo, hi in scored_chunks(dense, t_count):
        first, end, bias = grid_bias(head, chosen[lo:hi].long(), lo, sizes)
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
        selected = _backward_gathered if sizes.gathers else _backward_pairs
        selected(head, dense, sizes, out, lse, chosen, grad, grads)


def _backward_shared(head, lo, hi, k, v, bias, sizes, out, lse, grad, grad_q, causal=False) -> tuple[Tensor, Tensor]:
    """Backward of the queries lo..hi against one set of keys; adds to grad_q, returns the gradients of k and v."""
    groups = head.q.shape[1]
    q, o, g = (heads_view(x[lo:hi]) for x in (head.q, out, grad))
    k, v = shared(k, groups), shared(v, groups)
    gq, gk, gv = tile_backward(g, q, k, v, bias, o, lse[lo:hi].T[None], sizes.scale, causal)
    grad_q[lo:hi] += gq[0].transpose(0, 1)
    return gk[0].sum(0), gv[0].sum(0)


def _backward_local(head: Head, lo: int, hi: int, sizes: TileSizes, out, lse, grad, grads: _Grads) -> None:
    b = sizes.block
    bias = local_bias(b, head.q.shape[1], head.q)
    for piece in local_pieces(lo, hi, head.start, b):
        a, z, blocks = piece
        n, k, v, mask = local_operands(head, piece, b, bias)
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


def _backward_gathered(head: Head, lo: int, sizes: TileSizes, out, lse, chosen, grad, grads: _Grads) -> None:
    into = [whole_blocks(x, sizes.block) for x in (grads.k, grads.v)]
    for a, z, blocks, k, v, bias in gathered_tiles(head, lo, chosen[lo:], sizes):
        parts = _backward_shared(head, a, z, k, v, bias, sizes, out, lse, grad, grads.q)
        for whole, part in zip(into, parts):
            whole.index_add_(0, blocks, part.reshape(blocks.shape[0], -1))


def _backward_pairs(head: Head, lo: int, sizes: TileSizes, out, lse, chosen, grad, grads: _Grads) -> None:
    rows, groups = head.q.shape[0] - lo, head.q.shape[1]
    q, o, g, log = (x[lo:].reshape(rows, -1) for x in (head.q, out, grad, lse))
    grad_q = grads.q[lo:].view(rows, -1)
    order, blocks, counts = pairs_by_block(chosen[lo:])
    keys, values, grad_k, grad_v = (blocks_of(x, sizes.block) for x in (head.k, head.v, grads.k, grads.v))
    for block, queries in zip(blocks, (order // sizes.top).split(counts)):
        # Groups are passed as heads, which the operator's backward runs in parallel.
        to_heads = (x.index_select(0, queries).view(-1, groups, x.shape[1] // groups) for x in (g, q, o))
        grad_here, q_here, o_here = map(heads_view, to_heads)
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
        parts = sizes.parts(cross_k is not None)
        sparse = min(max(length + max(starts) - sizes.first_sparse_slot(), 0), length)
        rows = parts * groups * min(sparse, max(_PART_ELEMENTS // (parts * groups * dv), 2 * sizes.block))
        buffer = q.new_empty(rows, dv, dtype=wide)
        for row in range(batch):
            for h in range(hkv):
                head = take_head(q, first, k, v, cross_k, cross_v, cross_bias, starts, summaries, row, h, wide)
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
                head = take_head(q, first, k, v, cross_k, cross_v, cross_bias, ctx.starts, means, row, h, wide)
                mine = slice(h * groups, (h + 1) * groups)
                o = op_width(out[row, :, mine].to(wide), head.v)
                g = op_width(grad_out[row, mine].transpose(0, 1).to(wide), head.v)
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
