"""Any loss for a teacher and a student with different vocabularies: over cells of ids that both can say.

A cell is a class of ids of both vocabularies (`cachekd.vocabulary.CellMap`). Its logprob is the log of its
ids' summed probability, so that both sides have numbers for the same C cells; a loss of the table then takes
them as it takes the ids of one vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cachekd.errors import CachekdError
from cachekd.losses.chunked import LiveTargets
from cachekd.losses.merge import Merge

if TYPE_CHECKING:
    from cachekd.losses.targets import TeacherTargets
    from cachekd.vocabulary import CellMap


@dataclass(frozen=True)
class Cells:
    """The cells of two vocabularies, as tensors.

    Attributes:
        teacher: how its ids are merged; those in no cell make up one more, the last.
        student: how its ids are merged.
        count: C, how many cells both have ids in; numbered as in the map, less those.
    """

    teacher: Merge
    student: Merge
    count: int

    @classmethod
    def of(cls, cells: CellMap) -> Cells:
        """Lay out a map for merging, on the CPU.

        A cell that only one side has ids in compares nothing, and is none: of the other side it would say
        that it is impossible. Only a map after a blank has such (`VocabularyPair.cells_after`).
        """
        teacher, student = (torch.from_numpy(ids.astype("int64")) for ids in (cells.teacher, cells.student))
        both = torch.ones(cells.cells + 1, dtype=torch.bool)
        for side in (teacher, student):
            both &= torch.bincount(side + 1, minlength=cells.cells + 1) > 0
        both[0] = False  # of the ids in no cell
        count = int(both.sum())
        number = torch.where(both, both.cumsum(0) - 1, count)
        return cls(Merge.into(number[teacher + 1], count + 1), Merge.into(number[student + 1], count), count)

    def to(self, device: torch.device | str) -> Cells:
        """A copy on `device`."""
        return Cells(self.teacher.to(device), self.student.to(device), self.count)

    def of_student(self, logits: Tensor) -> Tensor:
        """Merge a student's logits: of each cell the log of the sum of exp.

        Args:
            logits: [n, V_S] float, unnormalised; columns beyond the tokenizer's tokens belong to no cell.

        Returns:
            [n, C] float32 (float64 of such), -inf where all of a cell's logits are; differentiable in
            `logits`. The logit of an id that is alone in its cell comes out as it is.

        Raises:
            CachekdError: there are so few columns that a cell has none.
        """
        if logits.ndim != 2 or logits.shape[1] < self.student.least:
            raise CachekdError(
                "the student's logits do not match its vocabulary",
                expected=f"[n, {len(self.student.cell)}]",
                found=list(logits.shape),
            )
        merged: Tensor = _LogSumExp.apply(logits, self.student)
        return merged

    def of_teacher(self, targets: TeacherTargets) -> CellTargets:
        """Merge the whole distribution of a teacher at a few tokens.

        Raises:
            CachekdError: it has more ids than the map, or so few that a cell has none.
        """
        size = len(self.teacher.cell)
        if not self.teacher.least <= targets.vocab_size <= size:
            raise CachekdError(
                "the teacher's targets do not match its vocabulary",
                expected=f"{size:,} ids",
                found=f"{targets.vocab_size:,}",
                fix="slice a padded vocabulary, or use the cache that was made with this vocabulary",
            )
        with torch.no_grad():
            merged = self.teacher.log_sum_exp(targets.everywhere())
            cells, left_out = merged[:, :-1], merged[:, -1:]
            # The share that cells hold of what there is, not of 1: where nothing is left out it is 1 to the
            # bit, and each number stays what it is.
            odds = left_out - cells.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(cells.dtype).min)
            return CellTargets(targets, self, cells + torch.nn.functional.softplus(odds))


@dataclass(frozen=True)
class CellTargets:
    """The teacher at N answer tokens over C cells (see `cachekd.losses.targets.TeacherTargets`).

    What the teacher gives to ids in no cell is dropped, and the rest divided by what is left. Of a top-k
    cache with a uniform tail the mass of a cell is as rough as the tail.

    Attributes:
        base: the teacher at these tokens, over its own ids.
        cells: how these are merged.
        logprobs: [N, C] float32, as normalised as the base's.
    """

    base: TeacherTargets
    cells: Cells
    logprobs: Tensor

    @property
    def token_ids(self) -> Tensor:
        """[N] int64, the cells of the teacher's answer tokens; -1 of one in none."""
        return _cells_at(self.base, self.cells)

    @property
    def vocab_size(self) -> int:
        """C."""
        return self.cells.count

    @property
    def window(self) -> int:
        """The base's."""
        return self.base.window

    @property
    def min_k(self) -> int:
        """The base's."""
        return self.base.min_k

    def __len__(self) -> int:
        return len(self.logprobs)

    def leading(self, window: int, min_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The cells of the base's selection, each once, by their own logprobs. Where ids share a cell, or are
        in none, k is less than the base's; it may be less than `min_k`, and 0."""
        ids, _, k = self.base.leading(window, min_k)
        cells = self.cells.teacher.cell[ids]
        chosen = torch.arange(ids.shape[1], device=ids.device) < k[:, None]
        cells = torch.where(chosen, cells, self.cells.count)
        # The first of its cell, in the base's order.
        ordered, order = cells.sort(dim=-1, stable=True)
        first = ordered.diff(dim=-1, prepend=torch.full_like(ordered[:, :1], -1)) != 0
        first = torch.zeros_like(first).scatter(-1, order, first) & (cells < self.cells.count)
        cells = cells.clamp(max=self.cells.count - 1)
        logprobs = self.logprobs.gather(-1, cells).masked_fill(~first, float("-inf"))
        logprobs, order = logprobs.sort(dim=-1, descending=True, stable=True)
        return cells.gather(-1, order), logprobs, logprobs.isfinite().sum(-1)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """See `TeacherTargets.topk`."""
        logprobs, cells = self.logprobs.topk(k, dim=-1)
        return cells, logprobs

    def gather(self, ids: Tensor) -> Tensor:
        """See `TeacherTargets.gather`."""
        return self.logprobs.gather(-1, ids)

    def everywhere(self) -> Tensor:
        """See `TeacherTargets.everywhere`."""
        return self.logprobs

    def select(self, rows: Tensor) -> Self:
        """See `TeacherTargets.select`."""
        return type(self)(self.base.select(rows), self.cells, self.logprobs[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """See `TeacherTargets.to`."""
        base = self.base.to(device, non_blocking=non_blocking)
        logprobs = self.logprobs.to(device, non_blocking=non_blocking)
        return type(self)(base, self.cells.to(device), logprobs)


@dataclass(frozen=True)
class OverCells:
    """A teacher over cells before anything is merged: `select` does it for a few tokens at a time.

    Attributes:
        base: the teacher at the N tokens that are compared.
        cells: how its ids are merged, on its device.
    """

    base: TeacherTargets | LiveTargets
    cells: Cells

    @property
    def token_ids(self) -> Tensor:
        """[N] int64, the cells of the teacher's answer tokens; -1 of one in none."""
        return _cells_at(self.base, self.cells)

    @property
    def vocab_size(self) -> int:
        """C."""
        return self.cells.count

    def __len__(self) -> int:
        return len(self.base)

    def select(self, rows: Tensor) -> CellTargets:
        """Select tokens by their indices [M] int64."""
        return self.cells.of_teacher(self.base.select(rows))


def _cells_at(base: TeacherTargets | LiveTargets, cells: Cells) -> Tensor:
    found = cells.teacher.cell[base.token_ids]
    return found.masked_fill(found == cells.count, -1)


class _LogSumExp(torch.autograd.Function):
    """Autograd would keep what each of the many small steps made; here a gradient is one look-up."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, merge: Merge) -> Tensor:
        merged = merge.log_sum_exp(logits)
        ctx.save_for_backward(logits, merged)
        ctx.merge = merge
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        return ctx.merge.gradient(*ctx.saved_tensors, above), None
