"""How large a pair is, and a step of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachekd.check.memory import StepMemory, StepSetting, step_memory
from cachekd.config import TrainConfig
from cachekd.config.batches import SAMPLES
from cachekd.config.fields import StudentPart
from cachekd.data import Encoded
from cachekd.models import ModelFiles, default_device, dtype_of, empty_model, parameters_by_part

# float32 weights, their gradients and AdamW's two moments.
_BYTES_TRAINED = 16


@dataclass(frozen=True)
class Sizes:
    """Parameters by part, and bytes in training; activations and logits come on top (`step_memory`).

    Attributes:
        teacher, student: part to number of parameters.
        teacher_bytes: of P_T and L_T with its head; V_T is not loaded.
        student_bytes: weights, gradients and AdamW's moments, all parts trained in float32.
    """

    teacher: dict[StudentPart, int]
    student: dict[StudentPart, int]
    teacher_bytes: int
    student_bytes: int


def sizes_of(teacher: Any, student: Any, *, teacher_dtype: torch.dtype) -> Sizes:
    """Count parameters on models without memory; no weights are read.

    Args:
        teacher, student: configs.
        teacher_dtype: of its frozen weights in training.
    """
    parts = {name: parameters_of(config) for name, config in (("teacher", teacher), ("student", student))}
    frozen = sum(count for part, count in parts["teacher"].items() if part != "vision_encoder")
    return Sizes(
        teacher=parts["teacher"],
        student=parts["student"],
        teacher_bytes=frozen * teacher_dtype.itemsize,
        student_bytes=sum(parts["student"].values()) * _BYTES_TRAINED,
    )


def parameters_of(config: Any) -> dict[StudentPart, int]:
    """Part to number of parameters, from a model's config alone; shared weights are counted once."""
    return {
        part: sum(parameter.numel() for parameter in parameters.values())
        for part, parameters in parameters_by_part(empty_model(config)).items()
    }


@dataclass(frozen=True)
class StepSizes:
    """A training step's memory, and of which step.

    Attributes:
        batch_size: samples.
        tokens: of each, those of the longest sample that was looked at.
        half: the dtype of autocast and teacher; None: float32.
        how: what else the run's file says of it; empty where it is as by default.
        kept, recomputed: without and with gradient checkpointing.
    """

    batch_size: int
    tokens: int
    half: str | None
    how: str
    kept: StepMemory
    recomputed: StepMemory


def step_sizes(
    teacher: ModelFiles,
    student: ModelFiles,
    samples: Sequence[tuple[Encoded, Encoded]],
    *,
    own_text: bool = False,
    run: TrainConfig | None = None,
) -> StepSizes | None:
    """Compute the memory of a step on this machine; see `step_memory`.

    Args:
        run: how the student trains; None: as by default.
        samples: as teacher and student read them; the longest of the student's counts.
        own_text: the switched path reads what the teacher does.
    """
    dtype = dtype_of("auto" if run is None else run.dtype, default_device())
    half = None if dtype == torch.float32 else dtype
    theirs, ours = max(samples, key=lambda pair: len(pair[1]))
    setting = StepSetting(SAMPLES, half) if run is None else StepSetting.of(run, half, len(ours))
    found = step_memory(
        student.config,
        teacher.config,
        ours,
        setting,
        as_teacher=theirs if own_text else None,
    )
    if not found:
        return None
    name = None if half is None else str(half).removeprefix("torch.")
    return StepSizes(setting.batch_size, len(ours), name, str(setting), found[False], found[True])
