"""The log of summed probabilities over disjoint groups of ids: many short sums, and a few very long ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from cachekd.losses.basics import full_precision
from cachekd.losses.chunked import at_a_time

# Up to so many members the sum runs over rows of cells, which a CPU adds side by side; beyond, along them.
_SIDE_BY_SIDE = 32


class Alike(NamedTuple):
    """Cells with about as many members: more than half of the most, and two at least.

    Attributes:
        cells: [c] int64.
        members: int64, V where there is none: [most, c], or [c, most] of cells with many.
        along: the axis of [n, *members.shape] that is summed over.
    """

    cells: Tensor
    members: Tensor
    along: int


@dataclass(frozen=True)
class Merge:
    """Of V ids, each in one of `count` cells or in none.

    The sums are those of a softmax: each cell's largest number is taken out before the exponential, as rows
    whose numbers lie further apart than float32 reaches would lose whole cells otherwise. Nothing is added by
    atomic operations, so that sums do not depend on their order; and shapes do not depend on numbers, so that
    nobody waits for a GPU.

    Attributes:
        cell: [V] int64, the cell of each id; `count` of one in none.
        first: [count] int64, a member of each cell; V of a cell without one.
        several: the cells of more than one member.
        count: the number of cells.
        least: so many ids, from 0 on, have a member of each cell that has one.
    """

    cell: Tensor
    first: Tensor
    several: tuple[Alike, ...]
    count: int
    least: int

    @classmethod
    def into(cls, cell: Tensor, count: int) -> Self:
        """Lay out the cells [V] int64 of all ids, 0 to `count`, the last of which is none."""
        size, numbers = len(cell), torch.bincount(cell, minlength=count + 1)[:count]
        order = torch.cat([cell.argsort(stable=True), torch.tensor([size])])  # members of a cell in a row
        starts = numbers.cumsum(0) - numbers
        first = torch.where(numbers > 0, order[starts], size)
        several, fewer, most = [], 1, 2
        while bool((numbers > fewer).any()):
            cells = ((numbers > fewer) & (numbers <= most)).nonzero()[:, 0]
            if len(cells):
                place = torch.arange(int(numbers[cells].max()))
                inside = place < numbers[cells, None]
                members = torch.where(inside, order[(starts[cells, None] + place).clamp(max=size)], size)
                wide = len(place) > _SIDE_BY_SIDE
                several.append(Alike(cells, members if wide else members.T.contiguous(), 2 if wide else 1))
            fewer, most = most, 2 * most
        own = first[first < size]
        return cls(cell, first, tuple(several), count, int(own.max()) + 1 if len(own) else 0)

    def to(self, device: torch.device | str) -> Self:
        """A copy on `device`."""
        several = tuple(
            Alike(cells.to(device), members.to(device), along) for cells, members, along in self.several
        )
        return type(self)(self.cell.to(device), self.first.to(device), several, self.count, self.least)

    @torch.no_grad()
    def log_sum_exp(self, logits: Tensor) -> Tensor:
        """Sum up, [n, W] float to [n, count] float32 (float64 of such); no gradient is kept.

        A cell of one member has its number to the bit; one of none, or of -inf alone, has -inf. Columns
        beyond V are nobody's; ids beyond W are never said.
        """
        size, rows = len(self.cell), self._rows(logits)
        dtype = full_precision(logits[:0]).dtype
        merged = logits.new_empty(len(logits), self.count, dtype=dtype)
        padded = logits.new_full((rows, size + 1), float("-inf"), dtype=dtype)
        for some, out in zip(logits[:, :size].split(rows), merged.split(rows), strict=True):
            from_ = padded[: len(some)]
            from_[:, : some.shape[1]] = some
            torch.index_select(from_, 1, self.first, out=out)
            for cells, members, along in self.several:
                terms = from_.index_select(1, members.flatten()).view(len(some), *members.shape)
                most = terms.amax(along, keepdim=True).clamp_(min=torch.finfo(dtype).min)  # of -inf alone
                sums = terms.sub_(most).exp_().sum(along)
                out.index_copy_(1, cells, sums.log_().add_(most.squeeze(along)))
        return merged

    @torch.no_grad()
    def gradient(self, logits: Tensor, merged: Tensor, above: Tensor) -> Tensor:
        """Hand a gradient [n, count] on to [n, W] logits: to each id its share of its cell's."""
        size, rows = len(self.cell), self._rows(logits)
        found = torch.empty_like(logits)
        found[:, size:] = 0
        # The last column is of ids in no cell. Where a cell has no mass its ids' share is e**-inf.
        sums, gradients = merged.new_full((2, rows, self.count + 1), float("inf"))
        gradients[:, -1] = 0
        parts = (each.split(rows) for each in (logits[:, :size], merged, above, found[:, :size]))
        for some, whole, towards, out in zip(*parts, strict=True):
            divisor, factor = sums[: len(some)], gradients[: len(some)]
            divisor[:, :-1] = whole.masked_fill(whole == float("-inf"), float("inf"))
            factor[:, :-1] = towards
            cell = self.cell[: some.shape[1]]
            share = divisor.index_select(1, cell).neg_().add_(some).exp_()
            out.copy_(share.mul_(factor.index_select(1, cell)))
        return found

    def _rows(self, logits: Tensor) -> int:
        """How many rows at a time: their terms, and the copy that these are picked from."""
        return min(max(1, len(logits)), max(1, at_a_time(logits.device) // (2 * len(self.cell) + 2)))
