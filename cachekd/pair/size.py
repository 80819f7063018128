"""What the two models weigh in training, before either is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cachekd.config.train import StudentPart
from cachekd.models import empty_model, parameters_by_part

# float32 weights, their gradients and AdamW's two moments.
_BYTES_TRAINED = 16


@dataclass(frozen=True)
class Sizes:
    """Parameters by part, and bytes in training; activations and logits come on top.

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
