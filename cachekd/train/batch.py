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
from cachekd.losses.terms import TERMS, Term
from cachekd.vocabulary import Alignment, Lead

IGNORE = -100  # the Trainer's label of a token that is not predicted


@dataclass(frozen=True)
class Example:
    """One sample to train on.

    Attributes:
        encoded: for the student.
        targets: the cached teacher; None without a cache, or for a sample that the cache lacks.
        for_teacher: the same sample as the teacher reads it, live, behind a bridge or across tokenizers; None
            where it reads what the student reads.
        aligned: across tokenizers, where both have read the same bytes; None where both read text alike.
    """

    encoded: Encoded
    targets: CachedTargets | None = None
    for_teacher: Encoded | None = None
    aligned: Alignment | None = None

    @property
    def taught(self) -> int:
        """How many answer tokens the teacher has something to say of, which are the teacher's own."""
        if self.targets is not None:
            return len(self.targets)
        return 0 if self.for_teacher is None else len(self.for_teacher.token_ids)


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
class AlignedRows:
    """Across tokenizers, which answer tokens of the student's in a batch are compared with which.

    Attributes:
        rows: by lead, [n] int64 numbers of the teacher's answer tokens, among those that it has something to
            say of, and [n] of the student's.
        rest: [M] int64, the student's others: L_CE alone.
        divisors: what each term's sum is divided by in this batch: L_CE by the student's answer tokens, the
            switched path's by the teacher's, the student's own others by the aligned ones.
        tokens: the student's answer tokens in samples of which there is a teacher.
        one_to_one: aligned ones that are a token of the teacher's, too.
        differing: samples whose answers are other bytes for the teacher, and how.
    """

    rows: dict[Lead, tuple[Tensor, Tensor]]
    rest: Tensor
    divisors: dict[str, int]
    tokens: int
    one_to_one: int
    differing: dict[str, str]

    @property
    def count(self) -> int:
        """How many are aligned."""
        return sum(len(ours) for _, ours in self.rows.values())

    def moved(self, move: Callable[[Any], Any]) -> Self:
        """Each tensor as `move` returns it."""
        rows = {lead: (move(theirs), move(ours)) for lead, (theirs, ours) in self.rows.items()}
        return replace(self, rows=rows, rest=move(self.rest))


@dataclass(frozen=True)
class Batch:
    """What the Trainer is given, as a DataLoader pins it and accelerate moves it.

    The Trainer also asks it for tensors by their names, as if it were a dictionary of the student's inputs
    with `labels`: it counts answer tokens and input tokens.

    Attributes:
        student: the student's inputs.
        keys: of the samples; none where the batch is a stand-in, of which nothing is predicted.
        targets: the cached teacher at the answer tokens that have one; None where none has.
        covered: [N] bool, which these are, of the teacher's answer tokens (which are the student's, unless it
            reads otherwise); None where all have one.
        teacher: the teacher's own inputs, live, behind a bridge or across tokenizers; None where it reads the
            student's.
        aligned: across tokenizers; None where both read text alike, and of a stand-in.
        left_out: what is wrong with the samples that the batch lacks, by their keys.
    """

    student: ModelInputs
    keys: list[str]
    targets: CachedTargets | None = None
    covered: Tensor | None = None
    teacher: ModelInputs | None = None
    aligned: AlignedRows | None = None
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
            aligned=None if self.aligned is None else self.aligned.moved(move),
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
    theirs = [example.for_teacher for example in examples if example.for_teacher is not None]
    covered, aligned = None, aligned_rows(examples)
    if theirs and aligned is not None:
        # The student's may be none of the teacher's ids. Any of these will do: what is padded is masked.
        pad_token_id = int(theirs[0].inputs["input_ids"][-1])
    teacher = _inputs(theirs, pad_token_id) if theirs else None
    reads = student if aligned is None else teacher
    if targets and len(targets) < len(examples) and reads is not None:
        has_targets = torch.tensor([example.targets is not None for example in examples])
        covered = has_targets.repeat_interleave(reads.supervised.sum(1))
    return Batch(
        student,
        keys=[example.encoded.key for example in examples],
        targets=CachedTargets.cat(targets) if targets else None,
        covered=covered,
        teacher=teacher,
        aligned=aligned,
    )


def aligned_rows(examples: list[Example]) -> AlignedRows | None:
    """Number the answer tokens of samples across tokenizers through their batch; None where both sides read
    text alike."""
    found = [(example, example.aligned) for example in examples if example.aligned is not None]
    if not found:
        return None
    # Beside cached targets, a sample without some has no token among them.
    cached = any(example.targets is not None for example, _ in found)
    parts: dict[Lead, list[tuple[Tensor, Tensor]]] = {}
    theirs = ours = tokens = 0
    for example, aligned in found:
        for lead, pair in aligned.rows.items():
            of_teacher, of_student = map(torch.as_tensor, pair)
            if not len(of_student):
                continue
            parts.setdefault(lead, []).append((of_teacher + theirs, of_student + ours))
        taught = 0 if cached and example.targets is None else example.taught
        theirs, ours = theirs + taught, ours + len(example.encoded.token_ids)
        if aligned.common or aligned.differs is not None:  # else there is no teacher of it
            tokens += len(example.encoded.token_ids)
    rows = {lead: _joined(pairs) for lead, pairs in parts.items()}
    is_rest = torch.ones(ours, dtype=torch.bool)
    for _, some in rows.values():
        is_rest[some] = False
    aligned_tokens = ours - int(is_rest.sum())
    read = sum(0 if one.for_teacher is None else len(one.for_teacher.token_ids) for one, _ in found)

    def divisor(term: Term) -> int:
        return ours if not term.taught else aligned_tokens if term.path == "own" else read

    return AlignedRows(
        rows=rows,
        rest=is_rest.nonzero()[:, 0],
        divisors={name: divisor(term) for name, term in TERMS.items()},
        tokens=tokens,
        one_to_one=sum(aligned.one_to_one for _, aligned in found),
        differing={one.encoded.key: aligned.differs for one, aligned in found if aligned.differs is not None},
    )


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    theirs, ours = (torch.cat(some) for some in zip(*pairs, strict=True))
    return theirs, ours


def _inputs(encoded: list[Encoded], pad_token_id: int) -> ModelInputs:
    tensors = collate(encoded, pad_token_id)
    return ModelInputs(supervised=tensors.pop("supervised"), tensors=tensors)
