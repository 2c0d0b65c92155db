# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Rows of consecutive real tokens, to which the columns of a padded or packed batch are mapped.

Shapes: B batch, R rows, N heads, T columns, L slots of the longest row, H head size.
"""

from typing import NamedTuple

import torch
from torch import nn


class Rows(NamedTuple):
    """How the columns of a padded or packed batch map to rows of consecutive real tokens.

    Attributes:
        source (`LongTensor` `[R, L]`): flat index (batch * columns + column) of the token in each row slot; slots
            beyond `counts` point at padding. L is the longest row.
        slot (`LongTensor` `[B, T]`): flat index (row * L + slot) of each column; arbitrary for padding.
        counts (`LongTensor` `[R]`): real tokens in each row.
        mask (`BoolTensor` `[B, T]`): the real columns.
        parts (`tuple` of `Rows`): the same, rows of alike lengths apart; none where that is no saving.
    """

    source: torch.Tensor
    slot: torch.Tensor
    counts: torch.Tensor
    mask: torch.Tensor
    parts: tuple = ()

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
    rows = Rows(source, slot.view(mask.shape), counts, mask)
    return rows._replace(parts=_by_length(rows))


def _by_length(rows: Rows) -> tuple[Rows, ...]:
    """Rows within a factor of two of each other's length together: else each costs as much as the longest."""
    size = (rows.counts - 1).clamp(min=1).log2().int()
    width = rows.source.shape[1]
    row, slot = rows.slot // width, rows.slot % width
    parts = []
    for value in size.unique().tolist():
        chosen = size == value
        source = rows.source[chosen][:, : int(rows.counts[chosen].max())]
        number = chosen.cumsum(0) - 1
        mask = rows.mask & chosen[row]
        there = torch.where(mask, number[row] * source.shape[1] + slot, 0)
        parts.append(Rows(source, there, rows.counts[chosen], mask))
    return tuple(parts) if len(parts) > 1 else ()


def padded_rows(states: torch.Tensor, attention_mask: torch.Tensor | None) -> Rows | None:
    """Map the new columns `[B, T]` to rows of real tokens; `None` if all are real."""
    mask = None if attention_mask is None else attention_mask[:, -states.shape[1] :].bool()
    # an exported graph cannot read the mask, so it does not use the shortcut
    return None if mask is None or not torch.compiler.is_exporting() and mask.all() else rows_of_mask(mask)


def packed_rows(states, attention_mask, position_ids) -> Rows | None:
    """Map the columns of packed documents to rows; `None` if no `position_ids` restart within a row.

    Within a document, the position of the next real token grows by 1, or by the number of columns if padding is
    counted, or by 1 from the padding column before it, as `generate` counts after a prompt padded on the right. An
    exported graph cannot inspect positions and treats each row as one document.
    """
    batch, columns = states.shape[:2]
    if position_ids is None or columns < 2 or torch.compiler.is_exporting():
        return None
    positions = position_ids[..., -columns:].expand(batch, -1)
    starts = positions.diff(dim=1) != 1
    if attention_mask is None:
        mask = torch.ones_like(positions, dtype=torch.bool)
    else:
        mask = attention_mask[:, -columns:].bool()
        column = torch.arange(columns, device=mask.device).expand(batch, -1)
        # the last real column before each column, or the first column
        before = torch.where(mask, column, 0).cummax(1).values[:, :-1]
        step = positions[:, 1:] - positions.gather(1, before)
        starts &= mask[:, 1:] & mask.gather(1, before) & (step != 1) & (step != column[:, 1:] - before)
    if not starts.any():
        return None
    starts = nn.functional.pad(starts, (1, 0))
    return rows_of_documents(starts | (mask & (mask.cumsum(1) == 1)), mask)
