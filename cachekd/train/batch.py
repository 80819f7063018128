"""From encoded samples to one batch of the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from cachekd.cache import CachedTargets
from cachekd.data import Encoded, collate
from cachekd.data.collate import ModelInputs
from cachekd.errors import CachekdError

IGNORE = -100  # the Trainer's label of a token that is not predicted


@dataclass(frozen=True)
class Example:
    """One sample to train on.

    Attributes:
        encoded: for the student.
        targets: the cached teacher; None without a cache, or for a sample that the cache lacks.
        for_teacher: the same sample as the teacher reads it, live or behind a bridge; None where it reads
            what the student reads.
    """

    encoded: Encoded
    targets: CachedTargets | None = None
    for_teacher: Encoded | None = None


@dataclass(frozen=True)
class Fault:
    """What there is of a sample that cannot be trained on.

    Attributes:
        key: the sample's.
        error: what is wrong with it.
        left_out: whether the run goes on without it.
    """

    key: str
    error: CachekdError
    left_out: bool


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


def collate_with_targets(
    examples: list[Example | Fault], pad_token_id: int, stand_in: Encoded | None = None
) -> Batch | Fault:
    """One batch of the Trainer; or the first fault that stops, where a worker met one.

    Args:
        stand_in: a sample that the model runs on where all of the batch are left out: without it this process
            would compute nothing, and the others would wait for its gradients. None of it is predicted.
    """
    faults = [example for example in examples if isinstance(example, Fault)]
    for fault in faults:
        if not fault.left_out:
            return fault
    good = [example for example in examples if isinstance(example, Example)]
    if good or stand_in is None:
        batch = batch_of(good, pad_token_id)
    else:
        student = batch_of([Example(stand_in)], pad_token_id).student
        batch = Batch(replace(student, supervised=torch.zeros_like(student.supervised)), keys=[])
    return replace(batch, left_out={fault.key: fault.error for fault in faults})


def batch_of(examples: list[Example], pad_token_id: int) -> Batch:
    """One batch of samples that can all be used."""
    student = _inputs([example.encoded for example in examples], pad_token_id)
    targets = [example.targets for example in examples if example.targets is not None]
    covered = None
    if targets and len(targets) < len(examples):
        has_targets = torch.tensor([example.targets is not None for example in examples])
        covered = has_targets.repeat_interleave(student.supervised.sum(1))
    theirs = [example.for_teacher for example in examples if example.for_teacher is not None]
    return Batch(
        student,
        keys=[example.encoded.key for example in examples],
        targets=CachedTargets.cat(targets) if targets else None,
        covered=covered,
        teacher=_inputs(theirs, pad_token_id) if theirs else None,
    )


def _inputs(encoded: list[Encoded], pad_token_id: int) -> ModelInputs:
    tensors = collate(encoded, pad_token_id)
    return ModelInputs(supervised=tensors.pop("supervised"), tensors=tensors)
