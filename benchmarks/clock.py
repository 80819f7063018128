"""The time of training steps, and the arithmetic of the first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

from cachekd.train.flops import FlopCounter


class Ticks:
    """Moments in the device's own time: what is queued there is not waited for before they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._at: list[Any] = []

    def mark(self) -> None:
        """Note the moment behind all that is queued."""
        if self._module is None:
            self._at.append(time.perf_counter())
            return
        event = self._module.Event(enable_timing=True)
        event.record()
        self._at.append(event)

    def seconds(self) -> list[float]:
        """Between each two; waits for the last."""
        if self._module is None:
            return [after - before for before, after in pairwise(self._at)]
        self._module.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._at)]


def seconds_of(function: Callable[[], object], device: torch.device, *, repeats: int = 5) -> float:
    """The median of some calls, after two to warm up."""
    ticks = Ticks(device)
    for number in range(repeats + 3):
        if number >= 2:
            ticks.mark()
        if number < repeats + 2:
            function()
    return statistics.median(ticks.seconds())


class Clock:
    """Wall and CPU time of each step but the first; of the first, its FLOPs."""

    def __init__(self, device: torch.device) -> None:
        self.flops, self.cpu = 0, list[float]()
        self._ticks = Ticks(device)
        self._counter: FlopCounter | None = None
        self._cpu_at: float | None = None

    def begin(self) -> None:
        """Before the first step."""
        self._counter = FlopCounter()
        self._counter.__enter__()

    def before_update(self) -> None:
        """After the first backward."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops, self._counter = self._counter.flops, None

    def end(self) -> None:
        """After a step."""
        self._ticks.mark()
        now = time.process_time()
        if self._cpu_at is not None:
            self.cpu.append(now - self._cpu_at)
        self._cpu_at = now

    @property
    def wall(self) -> list[float]:
        """Seconds."""
        return self._ticks.seconds()


class Timed(TrainerCallback):
    """Has the Trainer tell a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == 0:  # what is tried before it is no step
            self.clock.begin()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.clock.before_update()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.end()
