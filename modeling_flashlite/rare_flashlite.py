"""Rare digits: the higher digits of the few codes that a 4-bit digit cannot hold, each by itself.

At 3 bits a weight six codes in a thousand lie outside -8..7, but they are spread over a third of the columns, and over
nearly all columns of an embedding. As a list they take 6 bytes each, where second digits of whole columns would take
half a byte for each of their weights. SpQR (Dettmers et al. 2023) holds its outliers like this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .tiles_flashlite import TILE_ROWS


class RareDigits(NamedTuple):
    """Numbers to be added to single codes of a matrix `[N, K]`, row after row, in a row by columns.

    Attributes:
        starts (`torch.Tensor` int32 `[N + 1]`): where the entries of each row begin, and the end.
        columns (`torch.Tensor` int32 `[E]`): the column of each entry.
        values (`torch.Tensor` bfloat16 `[E]`): 16 times the second digit, or 256 times the third: exact in bfloat16.
    """

    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, count: int) -> RareDigits | None:
        """Entries in any order, rows and columns int64, of a matrix of `count` rows; `None` without entries."""
        if not len(rows):
            return None
        # NumPy sorts plain numbers several times as fast as pairs
        keys = ((rows << 24 | columns) << 12 | values.to(torch.int64) + 2048).cpu().numpy()
        keys.sort()
        keys = torch.from_numpy(keys).to(rows.device)
        columns, values = keys >> 12 & 0xFFFFFF, (keys & 0xFFF) - 2048
        return cls(_starts(keys >> 36, count), columns.to(torch.int32), values.to(torch.bfloat16))

    def rows(self) -> torch.Tensor:
        """The row of each entry, int64 `[E]`."""
        starts = self.starts.long()
        return torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(
            starts.diff(), output_size=len(self.columns)
        )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x `[M, K]` times the transposed matrix of the entries: `[M, N]` in x's dtype, differentiable in x."""
        # a bag of rows of x^T for each row of the matrix
        bags, *_ = torch.embedding_bag(
            x.t().contiguous(), self.columns, self.starts, False, 0, False, self.values.to(x.dtype), True
        )
        return bags.t()

    def add_to(self, codes: torch.Tensor, first: int) -> torch.Tensor:
        """Codes `[K or more, n]` of the rows from `first` on, columns first, with the entries added in place.

        The rows may go on past the end of the matrix.
        """
        starts = self.starts[first : first + codes.shape[1] + 1]
        begin, end = int(starts[0]), int(starts[-1])
        part = RareDigits(starts - begin, self.columns[begin:end], self.values[begin:end])
        places = part.columns.long() * codes.shape[1] + part.rows()
        codes.view(-1).index_add_(0, places, part.values.to(codes.dtype))
        return codes

    def look_up(self, ids: torch.Tensor, columns: int) -> torch.Tensor:
        """Rows of the matrix of entries, float32 `[P, K]`, for ids int64 `[P]`."""
        found = torch.zeros(len(ids) * columns, device=ids.device)
        # rows have few entries or none, and lists are faster than ten operations
        first, end = (self.starts[ids + i].tolist() for i in range(2))
        at = [entry for pair in zip(first, end) for entry in range(*pair)]
        if at:
            owners = [owner for owner, (a, b) in enumerate(zip(first, end)) for _ in range(a, b)]
            at, owners = torch.tensor([at, owners], device=ids.device)
            found.index_add_(0, owners * columns + self.columns[at], self.values[at].float())
        return found.view(len(ids), columns)

    def padded(self, count: int) -> RareDigits:
        """The same for a matrix of `count` rows, those added being empty."""
        spare = count + 1 - len(self.starts)
        return self._replace(starts=torch.cat([self.starts, self.starts[-1:].expand(spare)])) if spare else self

    def by_tiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tile after tile, and column by column: starts int32 `[tiles + 1]`, and entries int32 `[E, 2]`.

        An entry is 64 times its column plus its row in the tile, and the bits of its value in float32.
        """
        rows, count = self.rows(), -(-(len(self.starts) - 1) // TILE_ROWS)
        tiles, keys = rows // TILE_ROWS, self.columns.long() * TILE_ROWS + rows % TILE_ROWS
        order = (tiles << 32 | keys).argsort()
        entries = torch.stack([keys.to(torch.int32), self.values.float().view(torch.int32)], 1)[order]
        return _starts(tiles, count), entries


class ScaledDigits(NamedTuple):
    """[`RareDigits`], and for a product of one row of inputs their rows and weights.

    Attributes:
        digits ([`RareDigits`]): the entries.
        rows (`torch.Tensor` int32 `[E]`): their rows.
        weights (`torch.Tensor` float32 `[E]`): their values times the steps of the rows.
    """

    digits: RareDigits
    rows: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, digits: RareDigits, step: torch.Tensor) -> ScaledDigits:
        """With the steps float32 of all rows that have entries."""
        rows = digits.rows()
        return cls(digits, rows.to(torch.int32), digits.values * step.detach()[rows])

    def add_to(self, out: torch.Tensor, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """`out` `[M, N]` plus the product with x `[M, K]` and the steps `[N]`, in out's dtype."""
        if len(x) > 1:
            return torch.addcmul(out.float(), self.digits.product(x.float()), step).to(out.dtype)
        # for one dimension these operators take a fourth of the time
        added = x.view(-1).index_select(0, self.digits.columns) * self.weights
        return out.float().view(-1).index_add_(0, self.rows, added).to(out.dtype).view(out.shape)


def _starts(owners: torch.Tensor, count: int) -> torch.Tensor:
    """Where the entries of each owner begin, and the end, int32 `[count + 1]`."""
    starts = torch.zeros(count + 1, dtype=torch.int32, device=owners.device)
    torch.cumsum(torch.bincount(owners, minlength=count), 0, dtype=torch.int32, out=starts[1:])
    return starts
