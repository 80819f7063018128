"""What looks on while a student trains: requests to stop, the last log entry, waits for data."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy

Item = TypeVar("Item")


class RunStopped(Exception):
    """A run was stopped as it was asked to, and can be resumed.

    Attributes:
        step: the optimizer steps that are done.
        steps: those of the whole run.
        reason: what `asked_to_stop` said, the largest of all processes: a signal's number.
    """

    def __init__(self, step: int, steps: int, reason: int) -> None:
        super().__init__(f"stopped at step {step:,} of {steps:,}")
        self.step, self.steps, self.reason = step, steps, reason


def never() -> int:
    """Say that nobody asked the run to stop."""
    return 0


class LastStep(TrainerCallback):
    """Has the last step logged, with what was not logged before it, wherever it falls; unless nothing is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        control.should_log |= is_last and args.logging_strategy != IntervalStrategy.NO

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation may end a run as well. (A step is never logged twice.)"""
        self.on_step_end(args, state, control)


class StopInOrder(TrainerCallback):
    """Ends training after the optimizer step in which a process was asked to, with a log entry and a
    checkpoint, whatever `save_steps` is.

    All processes see the request after the same step: the largest answer of all counts. They agree on the
    CPU, so that no GPU is waited for.

    Args:
        asked: 0, or the reason to stop.
    """

    def __init__(self, asked: Callable[[], int]) -> None:
        self.asked = asked
        self.reason = 0
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1 and distributed.is_initialized():
            self._group = distributed.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reason = self._largest(self.asked())
        if self.reason and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True

    def _largest(self, reason: int) -> int:
        if self._group is None:
            return reason
        largest = torch.tensor(reason)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=self._group)
        return int(largest)

    def raise_if_stopped(self, state: TrainerState) -> None:
        """Tell a run that was stopped from one that is finished, after training.

        Raises:
            RunStopped: it was asked to stop before its last step.
        """
        if self.reason and state.global_step < state.max_steps:
            raise RunStopped(state.global_step, state.max_steps, self.reason)


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
        """Yield the same batches; the time until each is there is counted."""
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
        """The waiting since the first batch."""
        if self._started is None:
            return Waited()
        return Waited(self._waited, time.perf_counter() - self._started - self._paused)

    def since_last(self) -> Waited:
        """Return the waiting since the last call."""
        total, before = self.total, self._at_last
        self._at_last = total
        return Waited(total.waited - before.waited, total.elapsed - before.elapsed)


# Above this share a run is worth reading data for in more processes; not a run that is over in a moment.
MOST = 0.02
FEWEST_STEPS = 20
SHORTEST = 5.0  # seconds


def usable_cores() -> int:
    """Count the cores that this process may run on, its share of those that train on the machine."""
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
