"""Answer tokens of teacher and student side by side: which rows are aligned, and why others are not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat, zip_longest
from typing import Literal

from cachekd.vocabulary import PLAIN, Alignment, Lead, VocabularyPair
from cachekd.vocabulary.pieces import Piece, Readers, blanks_before

State = Literal["aligned", "other cells", "teacher inside a token", "student inside a token"]
Reason = Literal["blanks", "CJK", "digits", "inside words", "signs, as in code", "end of turn", "other bytes"]

_CJK = (
    (0x1100, 0x11FF),  # Hangul Jamo
    (0x2E80, 0x9FFF),  # radicals, punctuation, kana, Han
    (0xAC00, 0xD7FF),  # Hangul
    (0xF900, 0xFAFF),  # Han that is there for compatibility
    (0xFF00, 0xFFEF),  # full-width forms
    (0x20000, 0x3FFFF),  # more Han
)


@dataclass(frozen=True)
class Place:
    """A place in an answer where a token of one side begins, or one of each.

    Attributes:
        teacher, student: the number of its answer token; None where none begins here.
        state: aligned; other cells, where both have read the same bytes, and the next tokens are in different
            cells or in none; or which side is inside a token where the other's begins.
        lead: of an aligned row; see `Lead`.
    """

    teacher: int | None
    student: int | None
    state: State
    lead: Lead = PLAIN


_At = tuple[int, int, int]  # piece, whether at the name that ends it, byte


class SideBySide:
    """Lays the answer tokens of teacher and student side by side.

    Args:
        pair: whose tokens they are.
    """

    def __init__(self, pair: VocabularyPair) -> None:
        self.pair = pair
        self._readers = Readers(pair.teacher, pair.student)

    def places(self, teacher_ids: Sequence[int], student_ids: Sequence[int], found: Alignment) -> list[Place]:
        """All places of a sample's answers in the order of their bytes; each token is in one of them.

        Args:
            teacher_ids, student_ids: the answer tokens, all turns one after the other.
            found: what is aligned of them. Their bytes are the same but for blanks around an answer.
        """
        theirs, ours = self._begins(teacher_ids, student_ids)
        lead_of = {
            (int(i), int(j)): lead for lead, rows in found.rows.items() for i, j in zip(*rows, strict=True)
        }
        placed = [(ours[j], Place(i, j, "aligned", lead)) for (i, j), lead in lead_of.items()]
        both = set(theirs.values()) & set(ours.values())
        rest = [
            _at_each(begins, {row[side] for row in lead_of}) for side, begins in enumerate((theirs, ours))
        ]
        for at in rest[0].keys() | rest[1].keys():
            for i, j in zip_longest(*(side.get(at, []) for side in rest)):
                alone: State = "student inside a token" if j is None else "teacher inside a token"
                placed.append((at, Place(i, j, "other cells" if at in both else alone)))
        return [place for _, place in sorted(placed, key=lambda row: (row[0], _number(row[1])))]

    def lost(self, student_ids: Sequence[int], aligned: set[int]) -> Iterator[Reason]:
        """What stands where each of the student's answer tokens begins that is not aligned.

        Args:
            aligned: the numbers of those that are.
        """
        pieces = self._readers.of_student(student_ids)
        seen = 0
        for piece in pieces:
            for place, number in enumerate(piece.numbers.tolist()):
                seen += 1
                if number not in aligned:
                    yield _reason(piece, place)
        yield from repeat("end of turn", len(student_ids) - seen)

    def _begins(
        self, teacher_ids: Sequence[int], student_ids: Sequence[int]
    ) -> tuple[dict[int, _At], dict[int, _At]]:
        """Where the answer tokens of either side begin, by their numbers. A blank before an answer that only
        one side's answer has, as the other's chat template writes it, begins where the answer does."""
        read = self._readers.pieces(teacher_ids, student_ids)
        found: tuple[dict[int, _At], dict[int, _At]] = ({}, {})
        for number, sides in enumerate(zip_longest(*read)):
            blanks = [0 if one is None else len(blanks_before(one.text).encode()) for one in sides]
            for side, piece in enumerate(sides):
                if piece is None:
                    continue
                extra = blanks[side] - min(blanks)
                for place, token in enumerate(piece.numbers.tolist()):
                    at = (1, 0) if _is_name(piece, place) else (0, max(0, int(piece.starts[place]) - extra))
                    found[side][token] = (number, *at)
        return found


def _at_each(begins: dict[int, _At], taken: set[int]) -> dict[_At, list[int]]:
    """The numbers of tokens by where they begin, without those that are taken."""
    found = defaultdict(list)
    for number, at in begins.items():
        if number not in taken:
            found[at].append(number)
    return found


def _is_name(piece: Piece, place: int) -> bool:
    return piece.name is not None and place == len(piece.numbers) - 1


def _number(place: Place) -> int:
    return next(number for number in (place.student, place.teacher) if number is not None)


def _reason(piece: Piece, place: int) -> Reason:
    if _is_name(piece, place):
        return "end of turn"
    around = _characters(piece.text, int(piece.starts[place]))
    if any(first <= ord(one) <= last for one in around for first, last in _CJK):
        return "CJK"
    if any(map(str.isspace, around)):
        return "blanks"
    if all(map(str.isdigit, around)):
        return "digits"
    return "inside words" if all(map(str.isalpha, around)) else "signs, as in code"


def _characters(text: bytes, at: int) -> str:
    """The character that a byte is inside of; or the one before it and the one that begins at it."""
    start, end = at, at + 1
    while 0 < start < len(text) and _continues(text[start]):
        start -= 1
    if start == at:  # between two
        start -= 1
        while start > 0 and _continues(text[start]):
            start -= 1
    while end < len(text) and _continues(text[end]):
        end += 1
    return text[max(0, start) : end].decode(errors="replace")


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 goes on with a character."""
    return byte & 0xC0 == 0x80


@dataclass
class Aligned:
    """What is aligned of some samples' answers.

    Attributes:
        samples: how many.
        teacher_tokens, student_tokens: answer tokens of either side.
        common: places where both have read the same bytes.
        rows: those of them that are aligned: the next tokens are in one cell.
        one_to_one: those of these where the next tokens have the same bytes.
        lost: what stands where a token of the student begins that is not aligned, and how often.
        differing: samples whose answers have other bytes on both sides, and how; no row of theirs is aligned.
    """

    samples: int = 0
    teacher_tokens: int = 0
    student_tokens: int = 0
    common: int = 0
    rows: int = 0
    one_to_one: int = 0
    lost: Counter[Reason] = field(default_factory=Counter)
    differing: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        sides: SideBySide,
        key: str,
        teacher_ids: Sequence[int],
        student_ids: Sequence[int],
        *,
        cut: bool = False,
    ) -> None:
        """Count a sample.

        Args:
            teacher_ids, student_ids: its answer tokens, all turns one after the other.
            cut: whether the end of the answers may be missing on one side.
        """
        found = sides.pair.aligned(teacher_ids, student_ids, cut=cut)
        self.samples += 1
        self.teacher_tokens += len(teacher_ids)
        self.student_tokens += len(student_ids)
        if found.differs is not None:
            self.differing[key] = found.differs
            self.lost["other bytes"] += len(student_ids)
            return
        aligned = {int(j) for _, rows in found.rows.values() for j in rows}
        self.common += found.common
        self.one_to_one += found.one_to_one
        self.rows += len(aligned)
        self.lost.update(sides.lost(student_ids, aligned))
