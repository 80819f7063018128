"""One batch of the Trainer, from the worker that encoded it to the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from cachekd.cache import CachedTargets
from cachekd.data.collate import ModelInputs
from cachekd.errors import CachekdError

IGNORE = -100  # the Trainer's label of a token that is not predicted


@dataclass(frozen=True)
class Batch:
    """What the Trainer is given, as a DataLoader pins it and accelerate moves it.

    The Trainer also asks it for tensors by their names, as if it were a dictionary of the student's inputs
    with `labels`: it counts answer tokens and input tokens.

    Attributes:
        student: the student's inputs.
        keys: of the samples; none where the batch is a stand-in, of which nothing is predicted.
        targets: the cached teacher at the answer tokens that have one; None where none has.
        covered: [N] bool, which these are; None where all have one.
        teacher: the teacher's own inputs, live or behind a bridge; None where it reads the student's.
        left_out: what is wrong with the samples that the batch lacks, by their keys.
    """

    student: ModelInputs
    keys: list[str]
    targets: CachedTargets | None = None
    covered: Tensor | None = None
    teacher: ModelInputs | None = None
    left_out: dict[str, CachekdError] = field(default_factory=dict)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """A copy on `device`; what is there already is not copied."""
        return self._moved(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory, from which `to` need not block."""
        return self._moved(lambda x: x.pin_memory())

    def _moved(self, move: Callable[[Any], Any]) -> Self:
        return replace(
            self,
            student=self.student.moved(move),
            targets=None if self.targets is None else move(self.targets),
            covered=None if self.covered is None else move(self.covered),
            teacher=None if self.teacher is None else self.teacher.moved(move),
        )

    def __contains__(self, name: str) -> bool:
        return name == "labels" or name in self.student.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name == "labels":
            return self.student.tensors["input_ids"].masked_fill(~self.student.supervised, IGNORE)
        return self.student.tensors[name]

    def __len__(self) -> int:
        return len(self.student.tensors)
