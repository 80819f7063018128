"""What a training run will need, from a few real steps of it."""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from cachekd.config import TrainConfig
from cachekd.failures import memory_advice
from cachekd.train import make_trainer
from cachekd.trainer import SwitchKDTrainer

STEPS = 2  # that are timed, at least; the one before them allocates the optimizer's state
_RESET_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class TrainEstimate:
    """Measured on the first steps.

    Attributes:
        student_parameters, trained_parameters, teacher_parameters: numbers of them.
        bridge_parameters: of the switch bridge; 0 without one.
        memory: bytes at the peak by part: weights, gradients, optimizer state, and the rest (activations,
            logits, and what libraries hold).
        peak_bytes: of the GPU's allocator; without a GPU, of the whole process.
        seconds_per_step: of the optimizer's steps.
        steps: of the whole run.
        measured_steps: that were run.
    """

    student_parameters: int
    trained_parameters: int
    teacher_parameters: int
    bridge_parameters: int
    memory: dict[str, int]
    peak_bytes: int
    seconds_per_step: float
    steps: int
    measured_steps: int


class _Stopwatch(TrainerCallback):
    """Stops after a few steps; notes when each ended, and what the optimizer and the gradients hold."""

    def __init__(self, timed: int) -> None:
        self.steps = 1 + timed
        self.ends: list[float] = []
        self.total_steps = self.gradients = self.optimizer = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.total_steps = state.max_steps
        self.ends.append(time.perf_counter())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = sum(_bytes(p.grad) for p in kwargs["model"].parameters() if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        states = kwargs["optimizer"].state.values()
        self.optimizer = sum(_bytes(x) for state in states for x in state.values() if torch.is_tensor(x))
        control.should_training_stop = state.global_step >= self.steps


def estimate_training(config: TrainConfig) -> TrainEstimate:
    """Run a few steps of a run and throw them away; `config.out` is not touched.

    Raises:
        CachekdError: what `train` raises, out of memory among it.
    """
    # One round of `vsd_every` steps has one with the switched path in it.
    watch = _Stopwatch(max(STEPS, config.vsd_every))
    with tempfile.TemporaryDirectory() as folder, memory_advice(config):
        _reset_peak()
        quick = config.model_copy(update={"save_steps": 0})
        trainer = make_trainer(quick, Path(folder), [watch])
        trainer.train()
        peak = _peak_bytes()
    return _estimate(trainer, watch, peak)


def _estimate(trainer: SwitchKDTrainer, watch: _Stopwatch, peak: int) -> TrainEstimate:
    student, teacher = trainer.vlm, None if trainer.teacher is None else trainer.teacher.model
    memory = {
        "student": _weights(student),
        "teacher": 0 if teacher is None else _weights(teacher),
        "gradients": watch.gradients,
        "optimizer": watch.optimizer,
    }
    bridge = 0 if trainer.bridge is None else sum(p.numel() for p in trainer.bridge.parameters())
    if trainer.bridge is not None:
        memory["switch bridge"] = _weights(trainer.bridge)
        memory["gradients"] += _weights(trainer.bridge)
    memory["activations, logits, libraries"] = max(0, peak - sum(memory.values()))
    durations = [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)]
    timed = durations[1:] or durations
    return TrainEstimate(
        student_parameters=sum(p.numel() for p in student.parameters()),
        trained_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        teacher_parameters=0 if teacher is None else sum(p.numel() for p in teacher.parameters()),
        bridge_parameters=bridge,
        memory=memory,
        peak_bytes=peak,
        seconds_per_step=sum(timed) / len(timed),
        steps=watch.total_steps,
        measured_steps=len(durations),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _weights(model: nn.Module) -> int:
    return sum(_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _RESET_PEAK.exists():
        _RESET_PEAK.write_text("5")


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this peak was reset
        return next(1024 * int(line.split()[1]) for line in status.open() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
