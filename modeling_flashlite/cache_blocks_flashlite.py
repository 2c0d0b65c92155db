# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""A ring of key-value blocks, which is one decoder layer's cache and its segment memory.

The state of a layer is a pure function of its keys and values. A row's real tokens are in consecutive slots and
padding takes none, so left padding, right padding and no padding give the same state. Slot 0 is the beginning of the
row, whose first block is always kept. Blocks between it and the window of `memory_blocks` are dropped, so generation
of any length runs in bounded memory.

Shapes: B batch, R rows, N key-value heads, T new columns, S slots, H head size, b block size.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .attention_flashlite import AxisSpec, BlockSummaries, summarize_blocks
from .rows_flashlite import Rows

_LEAST_SLOTS = 64  # by which buffers grow
# spare blocks beyond the window, which allow `crop` to remove this many blocks of tokens
SPARE_BLOCKS = 4


class BlockLayer(DynamicLayer):
    """Keys, values and block summaries of one decoder layer: appending, summaries and eviction.

    `fill` is the number of slots in use (an `int` while all rows agree, else `LongTensor` `[B]`), `start` the slot of
    the newest chunk's first token, `base` the number of tokens dropped behind the first block (likewise), so that a
    later slot holds the position `base + slot`, `columns` the number of columns seen, padding included, which is what
    `generate` counts, and `mask` their real ones (`None` while there is no padding).
    `version` increases with every change other than appending, including moves of the buffers: derived state is valid
    for one version.
    """

    def __init__(self, spec: AxisSpec):
        self.spec, self.version = spec, 0
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Drop all states."""
        self.version += 1
        self.is_initialized = False
        self._keys: Any = None
        self._values: Any = None
        self._summaries: Any = None
        self._spare: Any = None
        self.mask: Any = None
        self.fill: Any = 0
        self.start: Any = 0
        self.base: Any = 0
        self.columns = self.summarized = 0

    @property
    def keys(self):
        """Keys by column, `[B, N, C, H]` with zeros at padding, or `None` while empty, as transformers' tools expect.

        Dimensions that encode positions are left out.
        """
        return None if self._keys is None else self._by_column(self._keys)[..., : self._values.shape[3]]

    @keys.setter
    def keys(self, value):
        self._keys, self.version = value, self.version + 1

    @property
    def values(self):
        """Values by column, `[B, N, C, H]` with zeros at padding, or `None` while empty."""
        return None if self._values is None else self._by_column(self._values)

    @values.setter
    def values(self, value):
        self._values, self.version = value, self.version + 1

    def _by_column(self, states: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return states[:, :, : self._used]
        slot, real = self.column_slots()
        index = slot[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return states.gather(2, index).masked_fill(~real.mT[:, None], 0.0)

    def column_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot of each remembered column, `[B, C]`, and whether it holds a real token, `[B, 1, C]`."""
        block = self.spec.block_size
        # columns between may be dropped: the first block is counted from the oldest, others from the newest
        early = self.mask.cumsum(1) - 1
        late = self._fill_tensor(self.mask.device)[:, None] - self.mask.flip(1).cumsum(1).flip(1)
        real = self.mask & ((early < block) | (late >= block))
        return torch.where(early < block, early, late).clamp(0, max(self._used - 1, 0)), real[:, None]

    @property
    def _used(self) -> int:
        return self.fill if isinstance(self.fill, int) else int(self.fill.max())

    @property
    def batch_size(self) -> int:
        """Batch rows held; -1 while empty."""
        return -1 if self._keys is None else self._keys.shape[0]

    @property
    def summaries(self) -> BlockSummaries | None:
        """Summaries of the blocks that lie entirely in the slots in use."""
        return _slice_summaries(self._summaries, self.spec, 0, self.summarized)

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included."""
        return self.columns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the first slots."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = key_states.new_zeros(*key_states.shape[:2], 0, key_states.shape[3])
        self._values = value_states.new_zeros(*value_states.shape[:2], 0, value_states.shape[3])
        self._summaries = summarize_blocks(self._keys, self._values, self.spec)
        self.is_initialized = True

    def update(self, key_states, value_states, rows: Rows | None = None):
        """Append `[B, N, T, H]` keys and values, given in row order, and return all slots up to the last one written.

        Raises:
            ValueError: if the batch differs from the one that the cache holds.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"The cache holds {self.batch_size} rows, but the batch has {key_states.shape[0]}; pass the cache of "
                "this batch, or none."
            )
        tokens = key_states.shape[2]
        ragged = rows is not None or not isinstance(self.fill, int)
        if ragged and rows is None and tokens == 1:
            return self._append_one(key_states, value_states)
        self._evict()
        end = self._used + tokens
        self._reserve(end)
        self.start = self.fill
        if not ragged:
            # `narrow` takes a third of the time of indexing, which matters for a single token
            self._keys.narrow(2, self.fill, tokens).copy_(key_states)
            self._values.narrow(2, self.fill, tokens).copy_(value_states)
            first, self.fill = self.fill, self.fill + tokens
        else:
            fill = self._fill_tensor(key_states.device)
            index = (fill[:, None] + torch.arange(tokens, device=fill.device))[:, None, :, None]
            for states in (self._keys, self._values):  # slots that a shorter row does not write get weight zero
                states[:, :, end - tokens : end] = 0
            self._keys.scatter_(2, index.expand_as(key_states), key_states)
            self._values.scatter_(2, index.expand_as(value_states), value_states)
            counts = tokens if rows is None else rows.counts
            first, self.fill = int(fill.min()), fill + counts
        self._record_columns(tokens, rows)
        # up to the last slot written, used or not: a padding query after a short row reads these blocks too
        self._summarize(first // self.spec.block_size, end // self.spec.block_size)
        return self._keys.narrow(2, 0, end), self._values.narrow(2, 0, end)

    def open_slots(self) -> list[int]:
        """Make room for one token of each row, and return the slot of each row, or of all, in the buffers.

        Whoever writes keys, values and, at the end of a block, summaries there by itself calls [`close_slots`] after.
        """
        self._evict()
        end = self._used + 1
        self._reserve(end)
        self.start = self.fill
        if isinstance(self.fill, int):
            return [self.fill]
        for states in (self._keys, self._values):
            states[:, :, end - 1] = 0  # a slot that a shorter row does not write gets weight zero
        return self.fill.tolist()

    def close_slots(self) -> None:
        """Take the tokens written to the slots of [`open_slots`] into account."""
        self.fill = self.fill + 1
        self._record_columns(1, None)
        blocks = self._used // self.spec.block_size
        if isinstance(self.fill, int):
            self.summarized = blocks
        elif blocks > self.summarized:  # of rows that do not end here
            self._summarize(self.summarized, blocks)

    def _append_one(self, key_states, value_states):
        """[`update`] by one token per row, for rows of different lengths; refreshes summaries of completed blocks."""
        self.open_slots()
        block, index = self.spec.block_size, torch.arange(self.batch_size, device=self.fill.device)
        for states, new in ((self._keys, key_states), (self._values, value_states)):
            states[index, :, self.fill] = new[:, :, 0].to(states.dtype)
        self.close_slots()
        for row in (self.fill % block == 0).nonzero()[:, 0].tolist():
            last = int(self.fill[row])
            slots = slice(last - block, last)
            fresh = summarize_blocks(
                self._keys[row : row + 1, :, slots], self._values[row : row + 1, :, slots], self.spec
            )
            whole = _slice_summaries(self._summaries, self.spec, last // block - 1, last // block)
            for part, new in zip(whole, fresh):
                part[row] = new[0]
        end = self._used
        return self._keys.narrow(2, 0, end), self._values.narrow(2, 0, end)

    def _fill_tensor(self, device) -> torch.Tensor:
        if isinstance(self.fill, int):
            return torch.full((self.batch_size,), self.fill, device=device)
        return self.fill

    def _record_columns(self, tokens: int, rows: Rows | None) -> None:
        if self.mask is not None or rows is not None:
            device = self._keys.device
            old = self.mask if self.mask is not None else torch.ones(self.batch_size, self.columns, dtype=torch.bool)
            new = rows.mask if rows is not None else torch.ones(self.batch_size, tokens, dtype=torch.bool)
            self.mask = torch.cat([old.to(device), new.to(device)], dim=1)
        self.columns += tokens if rows is None else rows.mask.shape[1]

    def _reserve(self, slots: int) -> None:
        """Grow the buffers by an eighth, at least 64 slots: appending takes amortized constant time."""
        spare, block = slots - self._keys.shape[2], self.spec.block_size
        if spare > 0:
            grow = -(-max(spare, slots // 8, _LEAST_SLOTS) // block) * block
            self._keys, self._values = _grow(self._keys, grow), _grow(self._values, grow)
            self.version += 1
        blocks = self._keys.shape[2] // block - self._summaries.keys.shape[2]
        if blocks > 0:  # a segment memory has the keys, but no summaries
            spare = blocks, blocks, blocks * (block // self.spec.sub_block_size)
            self._summaries = BlockSummaries(*map(_grow, self._summaries, spare))

    def _summarize(self, first: int, last: int) -> None:
        """Refresh the summaries of the blocks `first` to `last`, and of those before that have none yet.

        Blocks close in all rows at once or row by row; a segment memory has no summaries until it is used as a cache.
        """
        first = min(first, self.summarized)
        if last > first:
            block = self.spec.block_size
            fresh = summarize_blocks(
                self._keys[:, :, first * block : last * block],
                self._values[:, :, first * block : last * block],
                self.spec,
            )
            for part, new in zip(_slice_summaries(self._summaries, self.spec, first, last), fresh):
                part.copy_(new)
        self.summarized = last

    def _evict(self) -> None:
        """Drop blocks that no future query can reach, once they make up a fifth of the buffer."""
        if self.spec.memory_blocks is None:
            return
        keep = int(self.spec.reach) + SPARE_BLOCKS
        if self._used // self.spec.block_size > keep + max(keep // 4, 4):
            self.version += 1
            self._drop_between(keep)
            self._summaries = summarize_blocks(self._keys, self._values, self.spec)
            self.summarized = self._used // self.spec.block_size

    def _drop_between(self, keep: int) -> None:
        """Keep the first block, the newest one of each row, and the `keep` blocks before that."""
        block = self.spec.block_size
        if isinstance(self.fill, int):
            shift = max(self.fill // block - keep - 1, 0) * block
            if shift:
                self._keys, self._values = (
                    torch.cat([states[:, :, :block], states[:, :, block + shift :]], 2)
                    for states in (self._keys, self._values)
                )
        else:
            shift = (self.fill // block - keep - 1).clamp(min=0) * block
            self._keys, self._values = (_roll_rows(states, shift, block) for states in (self._keys, self._values))
        self.fill, self.base = self.fill - shift, self.base + shift
        if self.mask is not None:  # and the columns whose tokens were dropped in every row
            _, real = self.column_slots()
            self.mask = self.mask[:, real.any(0)[0] | ~self.mask.any(0)]

    def extend(self, key_states, value_states, rows: Rows | None = None):
        """The slots of this layer followed by new keys and values, out of place and differentiable in the new ones.

        Also returns the layer's successor: a detached memory of the first, the last `memory_blocks` and the current
        block.
        """
        successor = type(self)(self.spec)
        if not self.is_initialized:
            keys, values, fill = key_states, value_states, 0
        elif isinstance(self.fill, int):
            keys, values, fill = (
                torch.cat([self._keys[:, :, : self.fill], key_states], 2),
                torch.cat([self._values[:, :, : self.fill], value_states], 2),
                self.fill,
            )
        else:
            keys, values = self._append_ragged(self._keys, key_states), self._append_ragged(self._values, value_states)
            fill = self.fill
        tokens = key_states.shape[2]
        counts = tokens if rows is None else rows.counts
        successor._keys, successor._values = keys.detach(), values.detach()
        successor._summaries = summarize_blocks(successor._keys[:, :, :0], successor._values[:, :, :0], self.spec)
        successor.is_initialized, successor.device, successor.dtype = True, keys.device, keys.dtype
        successor.fill, successor.base = fill + counts, self.base
        successor.columns, successor.mask = self.columns, self.mask
        successor._record_columns(tokens, rows)
        successor.trim()
        return keys, values, successor

    def _append_ragged(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        index = (self.fill[:, None] + torch.arange(new.shape[2], device=new.device))[:, None, :, None].expand_as(new)
        return torch.cat([old[:, :, : self._used], old.new_zeros(new.shape)], 2).scatter(2, index, new)

    def trim(self) -> None:
        """Keep only blocks that future queries can reach: the first, the newest, and `memory_blocks` before it."""
        if self.spec.memory_blocks is not None:
            self._drop_between(int(self.spec.reach))


def _slice_summaries(summaries: BlockSummaries, spec: AxisSpec, first: int, last: int | None = None) -> BlockSummaries:
    """Views of the summaries of the blocks from `first` to `last`."""
    r = spec.block_size // spec.sub_block_size
    sub_blocks = slice(first * r, None if last is None else last * r)
    return BlockSummaries(
        summaries.keys[:, :, first:last], summaries.values[:, :, first:last], summaries.sub_keys[:, :, sub_blocks]
    )


def _grow(states: torch.Tensor, spare: int) -> torch.Tensor:
    """A copy of `[B, N, S, H]` with `spare` more slots.

    They are zero: a shorter row reaches them with weight zero after eviction, and what is not finite would stay so.
    """
    return torch.nn.functional.pad(states, (0, 0, 0, spare))


def _roll_rows(states: torch.Tensor, shift: torch.Tensor, first: int) -> torch.Tensor:
    """Remove `shift` (`[B]`) slots after the `first` ones from each row and shrink the width to the slots in use."""
    slots = torch.arange(states.shape[2] - int(shift.min()), device=states.device)
    index = torch.where(slots < first, slots, shift[:, None] + slots).clamp(max=states.shape[2] - 1)
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
