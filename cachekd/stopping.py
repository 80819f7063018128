"""How training ends: the last step is logged; asked to stop, it ends the running step, with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy


class RunStopped(Exception):
    """A run was stopped as it was asked to, and can be gone on with.

    Attributes:
        step: the optimizer steps that are done.
        steps: those of the whole run.
        reason: what `asked_to_stop` said, the largest of all processes: a signal's number.
    """

    def __init__(self, step: int, steps: int, reason: int) -> None:
        super().__init__(f"stopped at step {step:,} of {steps:,}")
        self.step, self.steps, self.reason = step, steps, reason


def never() -> int:
    """For runs that nobody stops."""
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
        """After training.

        Raises:
            RunStopped: it was asked to stop before its last step.
        """
        if self.reason and state.global_step < state.max_steps:
            raise RunStopped(state.global_step, state.max_steps, self.reason)
