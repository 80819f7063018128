"""How much of a run's answers was aligned across tokenizers, and which samples could not be."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from cachekd.atomic import commit
from cachekd.data.left_out import LeftOutSamples
from cachekd.train.batch import AlignedRows

log = logging.getLogger(__name__)

_FILE = "cachekd_alignment.json"  # in a checkpoint


@dataclass(frozen=True)
class AlignedShare:
    """How much of the answers was aligned, and which samples could not be.

    Attributes:
        tokens: the student's answer tokens of which there is a teacher, each time that they were trained on.
        aligned: of these, compared with the teacher.
        one_to_one: of these, those that are a token of the teacher's, too.
        differing: samples whose answers are other bytes for the teacher: nothing of them is aligned.
    """

    tokens: int = 0
    aligned: int = 0
    one_to_one: int = 0
    differing: LeftOutSamples = field(default_factory=LeftOutSamples)

    @property
    def share(self) -> float:
        """Aligned rows of all answer tokens."""
        return self.aligned / self.tokens if self.tokens else 0.0


class AlignmentNotes:
    """What the batches of this process said of how they were aligned."""

    def __init__(self) -> None:
        self._counts = [0, 0, 0]
        self._before = [0, 0, 0]  # a checkpoint, of all processes
        self._differing: dict[str, str] = {}

    def note(self, found: AlignedRows) -> None:
        """Take note of one batch."""
        for place, count in enumerate((found.tokens, found.count, found.one_to_one)):
            self._counts[place] += count
        self._differing |= found.differing

    def of_all(self) -> AlignedShare:
        """What all processes noted, each of which has to ask."""
        found: list[Any] = gather_object([(self._counts, self._differing)])
        each = zip(self._before, *(counts for counts, _ in found), strict=True)
        tokens, aligned, one_to_one = map(sum, each)
        self._differing = {key: why for _, some in found for key, why in some.items()} | self._differing
        return AlignedShare(tokens, aligned, one_to_one, LeftOutSamples.of(self._differing))

    def save(self, found: AlignedShare, checkpoint: Path) -> None:
        """Write what all processes noted beside the state that a run goes on from."""
        counts = [found.tokens, found.aligned, found.one_to_one]
        commit(checkpoint / _FILE, json.dumps([counts, self._differing]).encode())

    def load(self, checkpoint: Path) -> None:
        """Go on from what was noted before."""
        file = checkpoint / _FILE
        if file.exists():
            self._before, differing = json.loads(file.read_text())
            self._differing = {**differing, **self._differing}


def say_what_was_not_aligned(which: str, differing: LeftOutSamples) -> None:
    """Log the samples whose answers differ, at the end of a run.

    Args:
        which: samples these are.
        differing: whose answers are other bytes for the teacher.
    """
    if differing.samples:
        log.warning(
            "the answers of %s %s are other bytes for the teacher than for the student: nothing of them was "
            "aligned: %s",
            f"{differing.samples:,}",
            which,
            "; ".join(f"{key!r}: {why}" for key, why in list(differing.first.items())[:5]),
        )
