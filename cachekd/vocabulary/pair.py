"""Two vocabularies and what lies between them; the cells are found once per pair, and kept on the disk."""

from __future__ import annotations

import hashlib
import io
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from cachekd.atomic import write_file
from cachekd.errors import CachekdError
from cachekd.paths import cache_home
from cachekd.vocabulary.cells import CellFinder, CellMap
from cachekd.vocabulary.pieces import AnswerIds
from cachekd.vocabulary.rows import PLAIN, Aligner, Alignment, Lead
from cachekd.vocabulary.token_bytes import TokenBytes

Kind = Literal["cells", "exact"]
_VERSION = 2  # of how cells are found: what was kept of another version is found anew


@dataclass(frozen=True)
class VocabularyPair:
    """A teacher's vocabulary and a student's.

    Attributes:
        teacher: what the teacher's ids stand for.
        student: what the student's ids stand for.
        kind: "exact": only strings that both have are in cells; "cells": nearly all are.
        cells: the cell of each id.
    """

    teacher: TokenBytes
    student: TokenBytes
    kind: Kind
    cells: CellMap
    _after: dict[Lead, CellMap] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, teacher: TokenBytes, student: TokenBytes, kind: Kind) -> VocabularyPair:
        """Find the cells, or read what was kept of an earlier time; seconds for large vocabularies.

        They are kept in `vocabularies` in the folder for fetched caches (CACHEKD_HOME), keyed by all that
        they depend on. Where that folder cannot be written, or a file is damaged, they are found anew.
        """
        path = _place(teacher, student, kind, PLAIN)
        cells = _kept(path, len(teacher), len(student))
        if cells is None:
            cells = CellMap.build(teacher, student, exact=kind == "exact")
            _keep(path, cells)
        return cls(teacher, student, kind, cells)

    def cells_after(self, lead: Lead) -> CellMap:
        """The cells where one side's next token still has to emit a blank that the other side has read.

        What follows the blank in that side's tokens are its strings there: cells are the strings that both
        have then, and a token of the other side that is none of them goes where the first token of that
        side's encoding goes, of the blank and it. So " yes" meets "yes", whether or not that side has "yes"
        without a blank too. Its tokens that do not begin with the blank, and all names, are in no cell. These
        cells are numbered by themselves. After `PLAIN` they are `cells`.
        """
        if lead.side is None:
            return self.cells
        if lead not in self._after:
            path = _place(self.teacher, self.student, self.kind, lead)
            cells = _kept(path, len(self.teacher), len(self.student))
            if cells is None:
                exact = self.kind == "exact"
                cells = CellFinder(
                    self.teacher, self.student, exact=exact, led=lead.side, blank=lead.blank
                ).map()
                _keep(path, cells)
            self._after[lead] = cells
        return self._after[lead]

    def aligned(self, teacher_ids: AnswerIds, student_ids: AnswerIds, *, cut: bool = False) -> Alignment:
        """Find where both sides predict the next token after the same bytes of an answer.

        Those places are the beginning of each answer, the ends that tokens of both sides have in common, and
        the end of the answer where both go on with the end-of-turn token. Row (i, j) says that the teacher's
        answer token i and the student's answer token j are predicted there.

        White space around an answer may differ, as templates do. A special token inside an answer is matched
        by one in its cell alone. Where one side has no end-of-turn token, the other's are passed over.

        Args:
            teacher_ids: [N_T] the answer tokens of a sample, all its turns one after the other, with their
                end-of-turn tokens.
            student_ids: [N_S] likewise.
            cut: one side may end before the other, anywhere.

        Raises:
            CachekdError: a vocabulary lacks one of the ids.
        """
        return self._aligner(teacher_ids, student_ids, cut=cut)

    @cached_property
    def _aligner(self) -> Aligner:
        return Aligner(self.teacher, self.student, self.cells_after)


def _place(teacher: TokenBytes, student: TokenBytes, kind: Kind, lead: Lead) -> Path:
    """The file that keeps a map."""
    key = repr((_VERSION, teacher.fingerprint, student.fingerprint, kind, tuple(lead)))
    return cache_home() / "vocabularies" / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"


def _kept(path: Path, of_teacher: int, of_student: int) -> CellMap | None:
    """Read a map that was kept; None where there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            teacher, student = arrays["teacher"], arrays["student"]
            cells, shared = arrays["counts"].tolist()
    except Exception:  # zipfile, zlib and numpy have many kinds of errors for damaged bytes
        return None
    for ids, count in ((teacher, of_teacher), (student, of_student)):
        if (
            ids.shape != (count,)
            or ids.dtype != np.int32
            or ids.min(initial=0) < -1
            or ids.max(initial=-1) >= cells
        ):
            return None
    return CellMap(teacher, student, cells, shared)


def _keep(path: Path, cells: CellMap) -> None:
    """Write a map where it is found the next time; a disk that is full or read-only has none."""
    stream = io.BytesIO()
    counts = np.array([cells.cells, cells.shared])
    np.savez_compressed(stream, teacher=cells.teacher, student=cells.student, counts=counts)
    with suppress(CachekdError):
        write_file(path, stream.getvalue())
