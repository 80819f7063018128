"""Answer tokens, cut behind each name among them, with the bytes that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cachekd.errors import CachekdError
from cachekd.vocabulary.token_bytes import TokenBytes

AnswerIds = Sequence[int] | NDArray


def blanks_before(text: bytes) -> str:
    """The white space that a text begins with: Unicode's, as chat templates trim answers by it."""
    read = _decoded(text)
    return read[: len(read) - len(read.lstrip())]


def without_blanks_behind(text: bytes) -> bytes:
    """A text without the white space that it ends with, likewise."""
    return _decoded(text).rstrip().encode(errors="surrogateescape")


def _decoded(text: bytes) -> str:
    """A token may end inside a character; what is no text stays what it is."""
    return text.decode(errors="surrogateescape")


@dataclass(frozen=True)
class Piece:
    """A part of an answer up to a name, or to the end of what there is.

    Attributes:
        text: its bytes, without the name.
        name: the special token that it ends with; None: it ends without one.
        numbers: [n] of its tokens among the sample's answer tokens, the name's included.
        ids: [n] of its tokens.
        starts: [n + 1] where each token begins in `text`, and the end.
    """

    text: bytes
    name: int | None
    numbers: NDArray[np.int64]
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]

    def before_zero(self, at: int) -> bytes:
        """What of a token's text lies before the start 0."""
        return self.text[self.starts[at] - self.starts[0] : -self.starts[0]]

    def moved(self, begin: int) -> Piece:
        """The piece with its starts counted from a byte of its text."""
        return replace(self, starts=self.starts - begin)

    def at_zero(self) -> int | None:
        """The token that begins or goes on at the start 0; None where there is none."""
        at = int(np.searchsorted(self.starts, 0, side="right")) - 1
        return at if 0 <= at < len(self.ids) else None

    @property
    def is_blank(self) -> bool:
        """Whether it is white space that ends without a name, as behind a last end-of-turn token."""
        return self.name is None and not without_blanks_behind(self.text)


@dataclass(frozen=True)
class Reader:
    """A vocabulary, ready to cut answer tokens into pieces that end with a name."""

    tokens: TokenBytes

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """[V] the bytes of text of each id; 0 of names."""
        sizes = np.array([len(content) for content in self.tokens.contents], np.int64)
        sizes[list(self.tokens.special)] = 0
        return sizes

    @cached_property
    def is_name(self) -> NDArray[np.bool_]:
        """[V] whether an id stands for a name."""
        names = np.zeros(len(self.tokens), np.bool_)
        names[list(self.tokens.special)] = True
        return names

    def pieces(self, ids: AnswerIds, *, joined: bool) -> list[Piece]:
        """Cut a sample's answer tokens behind each name.

        Args:
            joined: end-of-turn tokens are left out: the other side has none that could match them.

        Raises:
            CachekdError: the vocabulary lacks one of the ids.
        """
        numbers = np.asarray(ids, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self.tokens):
            raise CachekdError(
                "an answer has a token that its vocabulary lacks",
                expected=f"ids from 0 to {len(self.tokens) - 1}",
                found=int(numbers.max() if numbers.max() >= len(self.tokens) else numbers.min()),
            )
        kept = np.arange(len(numbers))
        if joined:
            kept = kept[numbers != self.tokens.end_of_turn]
        kept = kept[(self.sizes[numbers[kept]] > 0) | self.is_name[numbers[kept]]]
        ends = (np.flatnonzero(self.is_name[numbers[kept]]) + 1).tolist()
        found = [self._piece(kept[a:b], numbers) for a, b in zip([0, *ends], [*ends, len(kept)], strict=True)]
        return found if len(found[-1].numbers) else found[:-1]

    def _piece(self, kept: NDArray[np.int64], numbers: NDArray[np.int64]) -> Piece:
        ids = numbers[kept]
        starts = np.concatenate([[0], np.cumsum(self.sizes[ids])])
        name = int(ids[-1]) if len(ids) and self.is_name[ids[-1]] else None
        text = b"".join(
            self.tokens.contents[number] for number in ids[: len(ids) - (name is not None)].tolist()
        )
        return Piece(text, name, kept, ids, starts)


class Readers:
    """Two vocabularies, ready to cut a sample's answer tokens in the same way.

    Where one of them has no end-of-turn token, the other's are passed over.
    """

    def __init__(self, teacher: TokenBytes, student: TokenBytes) -> None:
        self.teacher, self.student = Reader(teacher), Reader(student)
        self._joined = None in (teacher.end_of_turn, student.end_of_turn)

    def pieces(self, teacher_ids: AnswerIds, student_ids: AnswerIds) -> tuple[list[Piece], list[Piece]]:
        """The teacher's pieces, and the student's."""
        return self.teacher.pieces(teacher_ids, joined=self._joined), self.of_student(student_ids)

    def of_student(self, ids: AnswerIds) -> list[Piece]:
        """See `Reader.pieces`."""
        return self.student.pieces(ids, joined=self._joined)
