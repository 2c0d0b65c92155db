# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""The cache of Flash-Lite: a ring of key-value blocks that is also the segment memory.

The state of a layer is a pure function of its keys and values. A row's real tokens are in consecutive slots and
padding takes none, so left padding, right padding and no padding give the same state. Slot 0 is the beginning of the
row, whose first block is always kept. Blocks between it and the window of `memory_blocks` are dropped, so generation
of any length runs in bounded memory.

Shapes: B batch, R rows, N key-value heads, T new columns, S slots, H head size, b block size.
"""

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from .attention_flashlite import AxisSpec, BlockSummaries, summarize_blocks


def axis_spec(config) -> AxisSpec:
    """The axes of a decoder config."""
    return AxisSpec(config.block_size, config.sub_block_size, config.relevance_top_k, config.memory_blocks)


def _slice_summaries(summaries: BlockSummaries, spec: AxisSpec, first: int, last: int | None = None) -> BlockSummaries:
    """Views of the summaries of the blocks from `first` to `last`."""
    r = spec.block_size // spec.sub_block_size
    sub_blocks = slice(first * r, None if last is None else last * r)
    return BlockSummaries(
        summaries.keys[:, :, first:last], summaries.values[:, :, first:last], summaries.sub_keys[:, :, sub_blocks]
    )


def _grow(states: torch.Tensor, spare: int) -> torch.Tensor:
    """A copy of `[B, N, S, H]` with `spare` more, uninitialized slots."""
    batch, heads, slots, size = states.shape
    grown = states.new_empty(batch, heads, slots + spare, size)
    grown[:, :, :slots].copy_(states)
    return grown


def _fit(states: torch.Tensor, used: int, slots: int) -> torch.Tensor:
    """The first `used` slots of `[B, N, S, H]`, zero-padded to `slots`."""
    return torch.nn.functional.pad(states[:, :, :used], (0, 0, 0, slots - used))


# spare blocks beyond the window, which allow `crop` to remove this many blocks of tokens
_SPARE_BLOCKS = 4


class Rows(NamedTuple):
    """How the columns of a padded or packed batch map to rows of consecutive real tokens.

    Attributes:
        source (`LongTensor` `[R, L]`): flat index (batch * columns + column) of the token in each row slot; slots
            beyond `counts` point at padding. L is the longest row.
        slot (`LongTensor` `[B, T]`): flat index (row * L + slot) of each column; arbitrary for padding.
        counts (`LongTensor` `[R]`): real tokens in each row.
        mask (`BoolTensor` `[B, T]`): the real columns.
    """

    source: torch.Tensor
    slot: torch.Tensor
    counts: torch.Tensor
    mask: torch.Tensor

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """Columns to rows: `[B, N, T, H]` -> `[R, N, L, H]`."""
        flat = states.transpose(1, 2).flatten(0, 1)
        return flat.index_select(0, self.source.flatten()).unflatten(0, self.source.shape).transpose(1, 2)

    def scatter(self, states: torch.Tensor) -> torch.Tensor:
        """Rows to columns: `[R, N, L, H]` -> `[B, N, T, H]`; padding columns become zero."""
        flat = states.transpose(1, 2).flatten(0, 1)
        columns = flat.index_select(0, self.slot.flatten()).unflatten(0, self.slot.shape).transpose(1, 2)
        return columns.masked_fill(~self.mask[:, None, :, None], 0.0)

    def column_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot of each column, `[B, T]`, and whether a column's row holds another column's token, `[B, T, T]`."""
        row, slot = self.slot // self.source.shape[1], self.slot % self.source.shape[1]
        return slot, (row[:, :, None] == row[:, None, :]) & self.mask[:, None, :]


def rows_of_mask(mask: torch.Tensor) -> Rows:
    """Left-align each batch row: real tokens in order, then padding. `mask` is bool `[B, T]`."""
    batch, columns = mask.shape
    counts = mask.sum(1)
    # the longest row, except in an exported graph, whose shapes cannot depend on values
    width = columns if torch.compiler.is_exporting() else max(int(counts.max()), 1)
    row = torch.arange(batch, device=mask.device)[:, None]
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :width]
    slot = (mask.cumsum(1) - 1).clamp(min=0)
    return Rows(order + row * columns, slot + row * width, counts, mask)


def rows_of_documents(starts: torch.Tensor, mask: torch.Tensor) -> Rows:
    """Give each document of a packed batch its own row.

    Args:
        starts (`BoolTensor` `[B, T]`): true at the first token of each document.
        mask (`BoolTensor` `[B, T]`): the real columns, at least one.
    """
    real = mask.flatten().nonzero()[:, 0]
    first = starts.flatten()[real]
    row = first.cumsum(0) - 1
    within = torch.arange(len(real), device=real.device) - first.nonzero()[:, 0][row]
    counts = torch.bincount(row)
    width = int(counts.max())
    source = real.new_zeros(len(counts), width)
    source[row, within] = real
    slot = real.new_zeros(mask.numel())
    slot[real] = row * width + within
    return Rows(source, slot.view(mask.shape), counts, mask)


class FlashLiteCacheLayer(DynamicLayer):
    """Keys, values and block summaries of one decoder layer.

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
        self._evict()
        end = self._used + tokens
        self._reserve(end)
        self.start = self.fill
        if ragged and rows is None and tokens == 1:
            return self._append_one(key_states, value_states, end)
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

    def _append_one(self, key_states, value_states, end: int):
        """[`update`] by one token per row, for rows of different lengths; refreshes summaries of completed blocks."""
        fill, block = self._fill_tensor(key_states.device), self.spec.block_size
        index = torch.arange(len(fill), device=fill.device)
        for states, new in ((self._keys, key_states), (self._values, value_states)):
            states[:, :, end - 1] = 0  # a slot that a shorter row does not write gets weight zero
            states[index, :, fill] = new[:, :, 0].to(states.dtype)
        self.fill = fill + 1
        self._record_columns(1, None)
        if end // block > self.summarized:
            self._summarize(self.summarized, end // block)
        for row in (self.fill % block == 0).nonzero()[:, 0].tolist():
            last = int(self.fill[row])
            slots = slice(last - block, last)
            fresh = summarize_blocks(
                self._keys[row : row + 1, :, slots], self._values[row : row + 1, :, slots], self.spec
            )
            whole = _slice_summaries(self._summaries, self.spec, last // block - 1, last // block)
            for part, new in zip(whole, fresh):
                part[row] = new[0]
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
        """Grow the buffers in steps of an eighth, so that appending takes amortized constant time."""
        spare, block = slots - self._keys.shape[2], self.spec.block_size
        if spare > 0:
            grow = -(-max(spare, slots // 8, block) // block) * block
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
        keep = int(self.spec.reach) + _SPARE_BLOCKS
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
        successor = FlashLiteCacheLayer(self.spec)
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

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns.

        Raises:
            ValueError: for a positive number, for more columns than were seen, or for tokens whose context is gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes 0 or a negative number of tokens to remove, but got {tokens_to_remove}.")
        count = -int(tokens_to_remove)  # assisted generation of older versions of the library gives a tensor
        if count == 0 or not self.is_initialized:
            return
        removed = count if self.mask is None else self.mask[:, -count:].sum(1)
        fill = self.fill - removed
        lowest = fill if isinstance(fill, int) else int(fill.min())
        lost = torch.as_tensor((self.base > 0) & (fill // self.spec.block_size <= self.spec.reach))
        if lowest < 0 or count > self.columns or lost.any():
            raise ValueError(
                f"`crop` cannot take back {count} tokens: the window of {self.spec.reach} blocks has moved past them; "
                f"remove at most {_SPARE_BLOCKS * self.spec.block_size} tokens at a time, or raise `memory_blocks`."
            )
        self.version += 1
        self.fill, self.columns = fill, self.columns - count
        self.mask = None if self.mask is None else self.mask[:, :-count]
        self.summarized = min(self.summarized, self._used // self.spec.block_size)

    def _select(self, choose) -> None:
        """Apply `choose` to the batch dimension of the whole state."""
        if self.is_initialized:
            self.version += 1
            self._keys, self._values = choose(self._keys), choose(self._values)
            self._summaries = BlockSummaries(*(choose(part) for part in self._summaries))
            self._select_counts(choose)

    def _select_counts(self, choose) -> None:
        for name in ("fill", "base", "mask"):
            state = getattr(self, name)
            if isinstance(state, torch.Tensor):
                setattr(self, name, choose(state))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search.

        Only slots in use are copied, into spare buffers that are then swapped with the old ones: writing to newly
        allocated memory takes several times as long.
        """
        if not self.is_initialized:
            return
        beam_idx = beam_idx.to(self._keys.device)
        if len(beam_idx) != self.batch_size or self._keys.requires_grad or self._values.requires_grad:
            return self._select(lambda state: state.index_select(0, beam_idx))
        old, used = (self._keys, self._values), self._used
        if self._spare is None or not all(map(_can_replace, self._spare, old)):
            self._spare = tuple(map(torch.empty_like, old))
        for source, target in zip(old, self._spare):
            torch.index_select(source[:, :, :used], 0, beam_idx, out=target[:, :, :used])
        (self._keys, self._values), self._spare = self._spare, old
        self.version += 1
        if self.summarized:
            self._summaries = BlockSummaries(*(part.index_select(0, beam_idx) for part in self._summaries))
        self._select_counts(lambda state: state.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._select(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows in `indices`."""
        self._select(lambda state: state[indices.to(state.device)])
        if self.is_initialized:
            self._settle()

    def append_rows(self, other: "FlashLiteCacheLayer") -> None:
        """Append the rows of `other`; the newest columns of both become one column, and each row keeps its length.

        Raises:
            ValueError: if one of the two is empty.
        """
        if not (self.is_initialized and other.is_initialized):
            raise ValueError("A cache without tokens has no rows to join; run the prompt first.")
        parts, device = (self, other), self._keys.device
        slots = -(-max(part._used for part in parts) // self.spec.block_size) * self.spec.block_size
        keys, values = (
            [_fit(getattr(part, name), part._used, slots) for part in parts] for name in ("_keys", "_values")
        )
        masks = [part._column_mask() for part in parts]
        width = max(mask.shape[1] for mask in masks)
        self.mask = torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        fills = [part._fill_tensor(device) for part in parts]
        bases = [torch.as_tensor(part.base, device=device).expand(part.batch_size) for part in parts]
        self.fill, self.base, self.columns = torch.cat(fills), torch.cat(bases), max(part.columns for part in parts)
        self._keys, self._values = torch.cat(keys), torch.cat(values)
        self._summaries = summarize_blocks(self._keys, self._values, self.spec)
        self.summarized = self._used // self.spec.block_size
        self._spare = None
        self.version += 1
        self._settle()

    def _column_mask(self) -> torch.Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones(self.batch_size, self.columns, dtype=torch.bool, device=self._keys.device)

    def drop_columns(self, count: int) -> None:
        """Drop the oldest `count` columns, which are padding in every row."""
        self.columns -= count
        if self.mask is not None:
            empty = int(self.mask.any(0).int().argmax())
            self.mask = self.mask[:, min(count, empty) :]
            self._settle()

    def _settle(self) -> None:
        """Return to common counts once all rows have equal lengths, which allows faster paths."""
        counts = self.fill, self.base
        if any(isinstance(count, torch.Tensor) and bool((count != count[0]).any()) for count in counts):
            return
        self.fill, self.base = (int(torch.as_tensor(count).flatten()[0]) for count in counts)
        if self.mask is not None and bool(self.mask.all()):
            self.mask = None

    def reset_rows(self, rows: torch.Tensor) -> None:
        """Forget the rows where `rows` (bool `[B]`) is true, e.g. those whose document has ended."""
        if not self.is_initialized or not bool(rows.any()):
            return
        self.version += 1
        rows = rows.to(self._keys.device)
        self.fill = self._fill_tensor(rows.device).masked_fill(rows, 0)
        self.base = torch.as_tensor(self.base, device=rows.device).masked_fill(rows, 0).expand(len(rows)).clone()
        self.mask = None if self.mask is None else self.mask & ~rows[:, None]

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move the state back to the device it came from."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device) -> None:
        if self.is_initialized and self._keys.device != torch.device(device):
            self.version += 1
            self._keys = self._keys.to(device, non_blocking=True)
            self._values = self._values.to(device, non_blocking=True)
            self._summaries = BlockSummaries(*(part.to(device, non_blocking=True) for part in self._summaries))


def _can_replace(spare: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether `spare` can be written here and is as large as `states`."""
    writable = torch.is_inference_mode_enabled() or not spare.is_inference()
    return writable and spare.shape == states.shape and spare.device == states.device


def _roll_rows(states: torch.Tensor, shift: torch.Tensor, first: int) -> torch.Tensor:
    """Remove `shift` (`[B]`) slots after the `first` ones from each row and shrink the width to the slots in use."""
    slots = torch.arange(states.shape[2] - int(shift.min()), device=states.device)
    index = torch.where(slots < first, slots, shift[:, None] + slots).clamp(max=states.shape[2] - 1)
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


class EncoderCacheLayer(DynamicLayer):
    """The encoder's keys and values for one decoder layer.

    `whole` `[B, N, S, H or 2 H]` holds the keys with the dimensions that carry their positions; `keys` shows them
    without. `sources` (`LongTensor` `[B]`, `None` if each row is taken for itself) numbers the rows by their source:
    rows of one source, such as the beams of a sentence, are equal, so that reordering them moves no data. `version`
    rises with every change.
    """

    def __init__(self, *args, **kwargs):
        self.version, self.whole, self.sources = 0, None, None
        super().__init__(*args, **kwargs)

    @property
    def keys(self):
        """Keys `[B, N, S, H]` without the dimensions of the position, or `None` while empty."""
        return None if self.whole is None else self.whole[..., : self.values.shape[3]]

    @keys.setter
    def keys(self, value):
        self.whole, self.version = value, self.version + 1

    def update(self, key_states, value_states, *args, **kwargs):
        """Store the keys and values of all source tokens at once; returns the stored tensors.

        Raises:
            ValueError: if keys are held already.
        """
        if self.is_initialized:
            raise ValueError(
                f"The cache holds the keys of {self.whole.shape[2]} source tokens already; call `reset()` on it, or "
                "pass an empty cache, to read another source."
            )
        self.keys, self.values = key_states, value_states
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.whole, self.values

    def get_seq_length(self) -> int:
        """Source tokens held."""
        return 0 if self.whole is None else self.whole.shape[2]

    def _map(self, change) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.whole), change(self.values)

    def reset(self) -> None:
        """Drop all states."""
        self.keys = self.values = self.sources = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        if self.sources is not None:
            sources = self.sources.index_select(0, beam_idx.to(self.sources.device))
            if torch.equal(sources, self.sources):
                return
            self.sources = sources
        self._map(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map(lambda states: states.repeat_interleave(repeats, dim=0))
        self.sources = None if self.sources is None else self.sources.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows in `indices`."""
        self._map(lambda states: states[indices.to(states.device)])
        self.sources = None if self.sources is None else self.sources[indices.to(self.sources.device)]

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._map(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the state back to the device it came from."""
        self._map(lambda states: states.to(self.device, non_blocking=True))


class FlashLiteCache(DynamicCache):
    """The decoder's cache and segment memory; one [`FlashLiteCacheLayer`] per layer.

    Args:
        config ([`FlashLiteDecoderConfig`] or [`FlashLiteConfig`]): gives the axes and the number of layers.
        offloading (`bool`, defaults to `False`): keep the layers on the CPU between their uses.
    """

    def __init__(self, config, offloading: bool = False):
        config = config.get_text_config(decoder=True)
        spec = axis_spec(config)
        Cache.__init__(
            self, [FlashLiteCacheLayer(spec) for _ in range(config.num_hidden_layers)], offloading=offloading
        )

    def reset_rows(self, rows: torch.Tensor) -> None:
        """Forget the rows where `rows` (bool `[B]`) is true; for streams whose document has ended."""
        for layer in self.layers:
            layer.reset_rows(rows)


def own_cache(past_key_values):
    """The decoder's part of a cache, which is all of it where there is no encoder."""
    return (
        past_key_values.self_attention_cache if isinstance(past_key_values, EncoderDecoderCache) else past_key_values
    )


def prepare_cache(past_key_values, config, cross: bool):
    """Return `past_key_values` ready for the decoder of `config`, taking over an empty `DynamicCache` of the library.

    Args:
        past_key_values (`Cache`, *optional*): the user's or `generate`'s cache; `None` makes a new one.
        config ([`FlashLiteDecoderConfig`]): the decoder's config.
        cross (`bool`): whether there are encoder keys to hold too.

    Raises:
        ValueError: for a cache of another kind, or one that another model has filled.
    """
    if past_key_values is None:
        past_key_values = FlashLiteCache(config)
    if cross:
        if not isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
        other = past_key_values.cross_attention_cache
        if not other.layers or not all(isinstance(layer, EncoderCacheLayer) for layer in other.layers):
            if not isinstance(other, DynamicCache) or other.get_seq_length() > 0:
                raise ValueError(
                    f"The cache of the encoder's keys is a {type(other).__name__} of {other.get_seq_length()} tokens, "
                    "but this decoder keeps positions beside them; pass an `EncoderDecoderCache` of empty "
                    "`DynamicCache`s, or none."
                )
            other.layers = [EncoderCacheLayer() for _ in range(config.num_hidden_layers)]
            other.layer_class_to_replicate = None
    own = own_cache(past_key_values)
    if own.layers and all(isinstance(layer, FlashLiteCacheLayer) for layer in own.layers):
        if len(own.layers) != config.num_hidden_layers:
            raise ValueError(
                f"The cache has {len(own.layers)} layers, but the decoder has {config.num_hidden_layers}; pass a "
                "cache that this model made, or none."
            )
        return past_key_values
    if not isinstance(own, DynamicCache) or own.get_seq_length() > 0:
        raise ValueError(
            f"`past_key_values` is a {type(own).__name__} of {own.get_seq_length()} tokens, but this decoder keeps "
            "block summaries beside its keys; pass a `FlashLiteCache`, an empty `DynamicCache`, or none."
        )
    spec = axis_spec(config)
    own.layers = [FlashLiteCacheLayer(spec) for _ in range(config.num_hidden_layers)]
    own.layer_class_to_replicate = None
    return past_key_values


__all__ = ["FlashLiteCache", "FlashLiteCacheLayer"]
