"""What looks on while a student trains: stop requests, numbers that are not finite, waits for data."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy

from cachekd.atomic import is_failed_write, what_failed
from cachekd.errors import CachekdError
from cachekd.train.batch import Batch

if TYPE_CHECKING:
    from cachekd.train.trainer import SwitchKDTrainer


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


HUGE = 1e4  # no weight of a trained model is near it; what has grown to it overflows in the next forward
BOLD = 0.01  # AdamW moves every weight by about the learning rate in a step
_SLOWER = "lower --learning-rate, or raise --warmup"


@dataclass(frozen=True)
class Computed:
    """A batch whose gradients are in an optimizer step that is still to come.

    Attributes:
        loss: scalar, before it is divided by the step's answer tokens.
        terms: scalars, likewise.
        batch: as the Trainer gave it.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    batch: Batch


def stop_if_not_finite(trainer: SwitchKDTrainer, batches: Sequence[Computed], grad_norm: Any) -> None:
    """Refuse an optimizer step after which every weight would be NaN. One look at the device for all of it.

    What it takes to see it again goes into one file: the batches, their targets and terms, the weights.

    Args:
        batches: of this step, in this process.
        grad_norm: of the step. With a loss scaler (float16) it may be infinite: the scaler leaves such a
            step out by itself.

    Raises:
        CachekdError: a loss or the gradient is NaN or infinite; samples, terms and the file are named.
    """
    losses = torch.stack([batch.loss.float() for batch in batches])
    norm = grad_norm if type(grad_norm) is Tensor else torch.tensor(float(grad_norm or 0.0))
    *fine, steady = torch.cat([losses, norm.to(losses).reshape(1)]).isfinite().tolist()
    bad = [batch for batch, finite in zip(batches, fine, strict=True) if not finite]
    if bad:
        _stop(trainer, "the loss is not finite", bad[:1], "finite terms")
    if not steady and trainer.accelerator.scaler is None:
        _stop(trainer, "the gradient is not finite", batches, "a finite gradient of finite terms")


def stop_if_weights_not_finite(trainer: SwitchKDTrainer) -> None:
    """Refuse to save what is no model.

    Raises:
        CachekdError: a weight is NaN or infinite; the first such tensor is named.
    """
    name, size = _largest(trainer)
    if not math.isfinite(size):
        raise CachekdError(
            "the student's weights are not finite",
            where=f"{name}, after step {trainer.state.global_step}",
            found=_rate(trainer),
            fix=f"nothing of them was saved; {_SLOWER}",
        )


def _stop(trainer: SwitchKDTrainer, problem: str, batches: Sequence[Computed], expected: str) -> NoReturn:
    step = trainer.state.global_step
    rows = [{name: float(term) for name, term in batch.terms.items()} for batch in batches]
    path = Path(trainer.args.output_dir) / f"not-finite-step-{step}-process-{trainer.args.process_index}.pt"
    bridge = {} if trainer.bridge is None else {"switch_bridge": trainer.bridge.state_dict()}
    keys = [key for each in batches for key in each.batch.keys]
    saved = [
        {"keys": each.batch.keys, "terms": row, "batch": each.batch}
        for each, row in zip(batches, rows, strict=True)
    ]
    kept = _save({"step": step, "batches": saved, "student": trainer.vlm.state_dict()} | bridge, path)
    name, size = _largest(trainer)
    terms = [", ".join(f"{term} {value:g}" for term, value in row.items()) for row in rows]
    raise CachekdError(
        problem,
        where=f"step {step + 1}, samples {', '.join(map(repr, keys))}",
        expected=expected,
        found="; ".join([*terms, _rate(trainer), f"largest |weight| {size:g}, in {name}"]),
        fix=f"{_advice(trainer, size)}; {kept}",
    )


def _save(content: dict[str, Any], path: Path) -> str:
    """For who looks into it; says where it is, or why it is not. The cause is not the disk, full as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    except (OSError, RuntimeError) as error:
        if not is_failed_write(error):
            raise
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return f"batches, targets and weights could not be saved: {what_failed(error)}"
    return f"batches, targets and weights are in {path}: torch.load(path, weights_only=False)"


def _advice(trainer: SwitchKDTrainer, largest: float) -> str:
    args = trainer.args
    if not largest <= HUGE:  # NaN is not
        return f"{_SLOWER}: weights this large are a run that diverged"
    advice = "look at these samples"
    if args.learning_rate >= BOLD:
        advice = f"{_SLOWER}; or {advice}"
    if args.fp16:
        advice += "; or --dtype bfloat16, whose range is that of float32"
    elif args.bf16:
        advice += "; or --dtype float32"
    return advice


def _rate(trainer: SwitchKDTrainer) -> str:
    now = float(trainer.optimizer.param_groups[0]["lr"])
    return f"learning rate {now:g} of at most {trainer.args.learning_rate:g}"


def _largest(trainer: SwitchKDTrainer) -> tuple[str, float]:
    """The first weight tensor that is not finite, with NaN or inf; else that of the largest |weight|."""
    name, largest = "", 0.0
    for each, weight in trainer.vlm.state_dict().items():
        if not weight.is_floating_point() or weight.numel() == 0:
            continue
        size = float(weight.detach().abs().max())
        if not math.isfinite(size):
            return each, size
        if size > largest:
            name, largest = each, size
    return name, largest


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
