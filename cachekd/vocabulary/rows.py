"""Places in an answer where both sides have read the same bytes, and say what comes next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.vocabulary.cells import CellMap, Side
from cachekd.vocabulary.pieces import AnswerIds, Piece, Readers, blanks_before, without_blanks_behind
from cachekd.vocabulary.token_bytes import TokenBytes

_AROUND = 12  # bytes that a message shows before and behind where two answers differ


class Lead(NamedTuple):
    """Of the first row of an answer, where one template has written a blank that the other answer has.

    Attributes:
        side: whose next token still has to emit the blank; None: nobody's.
        blank: the bytes of white space.
    """

    side: Side | None
    blank: bytes


PLAIN = Lead(None, b"")


@dataclass(frozen=True)
class Alignment:
    """The aligned rows of a sample.

    Attributes:
        rows: of each lead, [n] int64 numbers of the teacher's answer tokens and [n] of the student's, which
            are predicted after the same bytes, and are in one cell.
        common: places where both sides predict a token after the same bytes; the rows are those among them
            where these two tokens are in one cell.
        one_to_one: rows where both tokens have the same bytes.
        differs: why nothing is aligned, in words: the answers' bytes differ; `rows` is empty then.
    """

    rows: dict[Lead, tuple[NDArray[np.int64], NDArray[np.int64]]]
    common: int
    one_to_one: int
    differs: str | None


class Aligner:
    """Aligns the answer tokens of two sides.

    Args:
        cells_after: as `VocabularyPair` has it.
    """

    def __init__(
        self, teacher: TokenBytes, student: TokenBytes, cells_after: Callable[[Lead], CellMap]
    ) -> None:
        self._tokens: dict[Side, TokenBytes] = {"teacher": teacher, "student": student}
        self._readers = Readers(teacher, student)
        self._cells_after = cells_after

    def __call__(self, teacher_ids: AnswerIds, student_ids: AnswerIds, *, cut: bool) -> Alignment:
        """Align as `VocabularyPair.aligned` says."""
        teacher, student = self._readers.pieces(teacher_ids, student_ids)
        for pieces, others in ((teacher, student), (student, teacher)):
            if len(pieces) == len(others) + 1 and pieces[-1].is_blank:
                pieces.pop()
        found, answer = _Found(), 1
        for theirs, ours in zip(teacher, student, strict=False):
            differs = found.add(theirs, ours, cut=cut) or self._names_differ(theirs, ours)
            if differs is not None:
                return Alignment({}, 0, 0, f"answer {answer}: {differs}")
            answer += theirs.name is not None and theirs.name == self._tokens["teacher"].end_of_turn
        if len(teacher) != len(student) and not cut:
            return Alignment({}, 0, 0, self._more(teacher, student))
        return self._in_one_cell(found)

    def _names_differ(self, theirs: Piece, ours: Piece) -> str | None:
        if theirs.name is None or ours.name is None:
            return None
        cells = self._cells_after(PLAIN)
        if cells.teacher[theirs.name] == cells.student[ours.name] != -1:
            return None
        names = self._tokens["teacher"].contents[theirs.name], self._tokens["student"].contents[ours.name]
        teacher, student = (_told(name) for name in names)
        return f"behind {_told(theirs.text[-_AROUND:])} the teacher reads {teacher} and the student {student}"

    def _more(self, teacher: list[Piece], student: list[Piece]) -> str:
        """Say what only one side has."""
        side: Side = "student" if len(student) > len(teacher) else "teacher"
        longer, shorter = sorted((teacher, student), key=len, reverse=True)
        contents = self._tokens[side].contents
        more = b"".join(contents[number] for number in longer[len(shorter)].ids[:_AROUND].tolist())
        return f"the {side} reads more: {_told(more)} behind the other's last token"

    def _in_one_cell(self, found: _Found) -> Alignment:
        """Keep the places where both sides' next tokens are in one cell."""
        rows, common, one_to_one = {}, 0, 0
        for lead, places in found.places.items():
            teacher, student, of_teacher, of_student, equal = map(np.concatenate, zip(*places, strict=True))
            cells = self._cells_after(lead)
            there = cells.teacher[of_teacher]
            kept = (there == cells.student[of_student]) & (there != -1)
            common, one_to_one = common + len(kept), one_to_one + int((equal & kept).sum())
            if kept.any():
                rows[lead] = teacher[kept], student[kept]
        return Alignment(rows, common, one_to_one, None)


class _Found:
    """The common places of a sample, piece by piece."""

    def __init__(self) -> None:
        # Of each lead: numbers and ids of both sides' next tokens, and whether these have the same bytes.
        self.places: dict[Lead, list[tuple[NDArray, NDArray, NDArray, NDArray, NDArray]]] = {}

    def add(self, teacher: Piece, student: Piece, *, cut: bool) -> str | None:
        """Note the common places of two pieces.

        Returns:
            how the pieces' texts differ; None: they do not, beyond white space around them.
        """
        first, second = _after_blanks(teacher.text, student.text)
        if cut and (teacher.is_blank or student.is_blank) and _begins(teacher.text, student.text):
            first = second = (
                0  # white space of an answer whose rest was cut off: it is read from its beginning
            )
        theirs, ours = teacher.text[first:], student.text[second:]
        same = _same(theirs, ours)
        is_end = (teacher.name is None and same == len(theirs)) or (
            student.name is None and same == len(ours)
        )
        if not (cut and is_end) and without_blanks_behind(theirs) != without_blanks_behind(ours):
            here = slice(max(0, same - _AROUND), same + _AROUND)
            return (
                f"from its byte {first + same} on the texts differ: the teacher reads {_told(theirs[here])}, "
                f"the student {_told(ours[here])}"
            )
        from_teacher, from_student = teacher.moved(first), student.moved(second)
        places, i, j = np.intersect1d(
            from_teacher.starts[:-1], from_student.starts[:-1], assume_unique=True, return_indices=True
        )
        common = (places >= 0) & (places <= same)
        self._note(PLAIN, from_teacher, from_student, i[common], j[common], same)
        if not (places == 0).any():
            self._note_lead(from_teacher, from_student, same)
        return None

    def _note_lead(self, teacher: Piece, student: Piece, same: int) -> None:
        """Note the beginning where one side's token has the end of the white space, and more, in it."""
        i, j = teacher.at_zero(), student.at_zero()
        if i is None or j is None:
            return
        blanks = teacher.before_zero(i), student.before_zero(j)
        if (blanks[0] == b"") == (blanks[1] == b""):  # neither side stands there
            return
        lead = Lead("teacher", blanks[0]) if blanks[0] else Lead("student", blanks[1])
        self._note(lead, teacher, student, np.array([i]), np.array([j]), same)

    def _note(self, lead: Lead, teacher: Piece, student: Piece, i: NDArray, j: NDArray, same: int) -> None:
        """Note common places: before the teacher's tokens `i` of a piece, and the student's `j`."""
        ends = teacher.starts[i + 1], student.starts[j + 1]
        equal = (ends[0] == ends[1]) & (ends[0] <= same)
        place = teacher.numbers[i], student.numbers[j], teacher.ids[i], student.ids[j], equal
        self.places.setdefault(lead, []).append(place)


def _after_blanks(teacher: bytes, student: bytes) -> tuple[int, int]:
    """Where two texts begin to be the same: behind what only one of them has of the white space before it."""
    theirs, ours = blanks_before(teacher), blanks_before(student)
    shared = min(len(theirs), len(ours))
    while not theirs.endswith(ours[len(ours) - shared :]):
        shared -= 1
    first, second = (len(blanks[: len(blanks) - shared].encode()) for blanks in (theirs, ours))
    return first, second


def _begins(one: bytes, other: bytes) -> bool:
    """Whether either text is the beginning of the other."""
    return one.startswith(other) or other.startswith(one)


def _same(one: bytes, other: bytes) -> int:
    """How many bytes two texts begin with in common."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return int(np.argmax(np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8)))


def _told(text: bytes) -> str:
    """Bytes in a message."""
    return repr(text.decode(errors="replace"))
