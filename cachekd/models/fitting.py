"""Batches that fit the memory: where it runs out, smaller ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from cachekd.data.batches import BatchLimits
from cachekd.models.device import free_memory
from cachekd.models.memory import OutOfMemory

R = TypeVar("R")

log = logging.getLogger(__name__)


class FittingBatches:
    """Runs samples in batches.

    Args:
        limits: of a batch.
        halves: whether batches become smaller, half as large each time, where memory runs out.

    Attributes:
        limits: as they are now.
        halved: how often they were halved.
    """

    def __init__(self, limits: BatchLimits, *, halves: bool) -> None:
        self._planned = self.limits = limits
        self._halves, self.halved = halves, 0

    def as_planned(self) -> None:
        """Take back what was halved."""
        self.limits, self.halved = self._planned, 0

    def run(
        self, lengths: Sequence[int], run: Callable[[list[int]], list[R]]
    ) -> Iterator[tuple[list[int], list[R]]]:
        """Run samples, batched by length.

        Args:
            lengths: of each sample, tokens.
            run: some of the samples, by their places in `lengths`.

        Yields:
            A batch's places, and what `run` returned.

        Raises:
            OutOfMemory: for a single sample, or where batches are not to become smaller.
        """
        batches = self.limits.cut(lengths)
        while batches:
            batch = batches[0]
            longest = max(lengths[place] for place in batch)
            self.limits.say_what_runs_alone(longest)
            try:
                results = run(batch)
            except OutOfMemory:
                if not self._halves or len(batch) == 1:
                    raise
                results = None
            if results is not None:
                yield batch, results
                del batches[0]
                continue
            # Here the frames that held the batch's tensors are gone.
            free_memory()
            self.limits, self.halved = self.limits.below(len(batch), longest), self.halved + 1
            log.warning("memory ran out: from now on %s", self.limits)
            left = [place for some in batches for place in some]
            again = self.limits.cut([lengths[place] for place in left])
            batches = [[left[place] for place in some] for some in again]
