"""How long the steps wait for data."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")

# Above this share a run is worth reading data for in more processes; not a run that is over in a moment.
MOST = 0.02
FEWEST_STEPS = 20
SHORTEST = 5.0  # seconds


def usable_cores() -> int:
    """Of this process's machine, those that it may run on, shared among the processes that train there."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def advice(share: float, workers: int, steps: int, seconds: float) -> str | None:
    """What would shorten the waiting; None where there is nothing to be said.

    Args:
        share: of the time in which the steps waited (`Waited.share`).
        workers: processes that read, as they were.
        steps: of the optimizer, in this session.
        seconds: that they took.
    """
    if share <= MOST or steps < FEWEST_STEPS or seconds < SHORTEST:
        return None
    more = min(workers + 2, usable_cores() - 1)  # the steps need one
    if more <= workers:
        return None
    waited = f"the steps waited for data in {share:.1%} of the time"
    return f"{waited}: --workers {more} reads ahead in as many processes"


class Waited(NamedTuple):
    """Seconds spent in waiting for batches, out of `elapsed` seconds of wall time."""

    waited: float = 0.0
    elapsed: float = 0.0

    @property
    def share(self) -> float:
        """0 to 1; 0 where no time has passed."""
        return self.waited / self.elapsed if self.elapsed > 0 else 0.0


class DataWait:
    """Measures the share of the wall time in which the training loop waits for its next batch.

    The clock starts when the first batch is there: starting workers and opening shards is no waiting that
    more workers would shorten. What is counted is the time that the loop itself stands still. On a CPU no
    step runs in that time. A GPU still works off what was queued before, so there the share is an upper bound
    of the time in which it is idle; within 2 % it is not worth a thought.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._waited = self._paused = 0.0
        self._at_last = Waited()

    def timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The same batches; the time until each is there is counted."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            there = time.perf_counter()
            if self._started is None:
                self._started = there
            else:
                self._waited += there - asked
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, the loop does something else than steps: the time does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._started is not None:
                self._paused += time.perf_counter() - began

    @property
    def total(self) -> Waited:
        """Since the first batch."""
        if self._started is None:
            return Waited()
        return Waited(self._waited, time.perf_counter() - self._started - self._paused)

    def since_last(self) -> Waited:
        """Since the last call."""
        total, before = self.total, self._at_last
        self._at_last = total
        return Waited(total.waited - before.waited, total.elapsed - before.elapsed)
