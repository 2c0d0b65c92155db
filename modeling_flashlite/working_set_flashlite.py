"""Keys and values that the tokens of one block attend to, laid out for few operations per token."""

import math

import torch
from torch import Tensor

from .attention_dense_flashlite import joint_attention
from .attention_flashlite import AxisSpec, BlockSummaries, block_table, is_block_table
from .attention_parts_flashlite import top_blocks

# Up to this many key-value heads over all rows, decoding uses a working set: one thread gathers its chosen blocks.
_FEW_HEADS = 16


def fits_working_set(k: Tensor, v: Tensor, spec: AxisSpec, start: int) -> bool:
    """Whether a query in slot `start` can use a [`WorkingSet`] of `k` and `v` and is likely faster with it."""
    b = spec.block_size
    top = math.inf if spec.relevance_top_k is None else spec.relevance_top_k
    few = k.shape[:2].numel() <= _FEW_HEADS
    return top < spec.reach - 1 and start // b > top + 2 and few and is_block_table(k, b) and is_block_table(v, b)


class WorkingSet:
    """Keys and values that the queries of one block can attend to, laid out so that a token is a few products.

    Per row and key-value head, in the type of the computation: the grid slots of all candidates, the encoder's keys,
    the first, the previous and the own block side by side, and the `K` chosen blocks beside them. Per-operator
    overhead dominates the time of a token, so everything that changes only when a block closes is computed here once
    for the `b` tokens of a block. Equal to `multi_axis_attention`.

    A working set refers to `k` and `v` in place: it is valid until they move or change other than by appending. The
    decoding session owns it and watches the cache's version; [`fits_working_set`] lists the conditions.

    Args:
        k, v: keys [B, Hkv, S, dk] and values [B, Hkv, S, dv] that hold the own block's tokens up to the newest.
        spec: the sizes of the axes; `block` has more than `relevance_top_k` candidates.
        block: the block of the queries.
        summaries: of all blocks before the own one, at least.
        cross: as in `multi_axis_attention`.
    """

    def __init__(self, k: Tensor, v: Tensor, spec: AxisSpec, block: int, summaries: BlockSummaries, cross=None):
        b, top = spec.block_size, spec.relevance_top_k or 0
        self.spec, self.top, self.block, self.begin, self.newest = spec, top, block, block * b, -2
        first = 1 if spec.memory_blocks is None else max(block - spec.memory_blocks, 1)
        self.count, extra = block - 1 - first, 0 if cross is None else cross[0].shape[2]
        wide, heads = torch.promote_types(k.dtype, torch.float32), k.shape[:2].numel()
        self.heads, beside, self.chosen, self.moves = heads, [], [], []
        head = torch.arange(heads, device=k.device)[:, None]
        for x, means, other in zip((k, v), summaries, (None, None) if cross is None else cross[:2]):
            parts = [means[:, :, first : first + self.count], x[:, :, :b], x[:, :, self.begin - b : self.begin]]
            if other is not None:
                parts.insert(1, other)
            room = x.new_zeros(*x.shape[:2], b, x.shape[3])
            beside.append(torch.cat([part.to(wide) for part in (*parts, room)], 2).flatten(0, 1))
            table, step = block_table(x, b)
            self.chosen.append(x.new_empty(heads, top * b, x.shape[3], dtype=wide))
            self.moves.append((table, head * step + first, self.chosen[-1].view(heads * top, b * x.shape[3])))
        self.values, self.chosen[0] = beside[1], self.chosen[0].mT
        self.bias = beside[0].new_zeros(heads, 1, beside[0].shape[1])
        self.bias[..., : self.count], self.bias[..., -b:] = math.log(b), -math.inf
        if cross is not None and cross[2] is not None:
            dark = ~cross[2].bool().repeat_interleave(k.shape[1], dim=0)
            self.bias[:, 0, self.count : self.count + extra].masked_fill_(dark, -math.inf)
        self.own = [x[:, -b:] for x in (*beside, self.bias.mT)]
        self.keys = beside[0].mT
        self.first = 2, self.count + extra, b
        self.sub_blocks = b // spec.sub_block_size
        candidates = slice(first * self.sub_blocks, (first + self.count) * self.sub_blocks)
        self.sub_keys = summaries.sub_keys[:, :, candidates].flatten(0, 1).to(wide).mT

    def attend(self, rows: Tensor, k: Tensor, v: Tensor, start: int, first_rows: Tensor | None = None) -> Tensor:
        """The output [B Hkv, G, dv] of the scaled queries [B Hkv, G, dk] in slot `start`.

        `first_rows` are the queries for the first block, if different (`first_query` elsewhere).
        """
        self._take_own(k, v, start)
        logits = torch.baddbmm(self.bias, rows, self.keys)
        if first_rows is not None:
            logits.narrow(*self.first).copy_(torch.bmm(first_rows, self.keys.narrow(*self.first)))
        if not self.top:
            return torch.bmm(logits.softmax(2), self.values)
        chosen = self._choose(rows)
        for table, shift, target in self.moves:
            lines = (chosen + shift).view(-1)
            if table.dtype == target.dtype:
                torch.index_select(table, 0, lines, out=target)
            else:
                target.copy_(table.index_select(0, lines))
        # a block that is read in full is not on the grid
        logits.scatter_(2, chosen[:, None].expand(-1, rows.shape[1], -1), -math.inf)
        return joint_attention([logits, torch.bmm(rows, self.chosen[0])], [self.values, self.chosen[1]])

    def _take_own(self, k: Tensor, v: Tensor, start: int) -> None:
        """Copy the newest token of the own block, or all tokens if several were added since the last query."""
        slot, begin = start - self.begin, self.begin
        if slot == self.newest + 1:
            key, value, bias = (own.select(1, slot) for own in self.own)
            key.copy_(k.select(2, start).flatten(0, 1))
            value.copy_(v.select(2, start).flatten(0, 1))
            bias.zero_()
        else:
            for own, x in zip(self.own, (k, v)):
                own[:, : slot + 1] = x[:, :, begin : start + 1].flatten(0, 1)
            self.own[2][:, : slot + 1] = 0
        self.newest = slot

    def _choose(self, rows: Tensor) -> Tensor:
        """The chosen candidates [B Hkv, K] of the scaled queries [B Hkv, G, dk]."""
        shares = torch.bmm(rows, self.sub_keys).softmax(2)
        if self.sub_blocks > 1:
            shares = shares.unflatten(2, (-1, self.sub_blocks)).sum(3)
        return top_blocks(shares.amax(1), self.top)
