"""Cells: classes of the token ids of two vocabularies, over which both models' probabilities are summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cachekd.vocabulary.merges import Merges
from cachekd.vocabulary.token_bytes import TokenBytes

Side = Literal["teacher", "student"]
OTHER: dict[Side, Side] = {"teacher": "student", "student": "teacher"}


@dataclass(frozen=True)
class CellMap:
    """Which cell each token id of two vocabularies is in: a cell is a string that both have, or a name.

    Attributes:
        teacher: [V_T] int32, the cell of each id; -1: in none.
        student: [V_S] int32, likewise.
        cells: how many there are, numbered from 0 in the order of the teacher's ids.
        shared: strings of text that both have; the other cells are names: the two end-of-turn tokens, and
            special tokens of equal content.
    """

    teacher: NDArray[np.int32]
    student: NDArray[np.int32]
    cells: int
    shared: int

    @classmethod
    def build(cls, teacher: TokenBytes, student: TokenBytes, *, exact: bool = False) -> CellMap:
        """Put every id into a cell.

        A token whose string both have is in that string's cell. Another one goes where the first token of the
        other vocabulary's encoding of it goes, and so on: the strings grow shorter, until one is shared, or
        none is left. Several ids of the same bytes ("<0x41>" and "A") are in one cell.

        Args:
            exact: the tokens whose strings the other vocabulary lacks are in no cell.
        """
        return CellFinder(teacher, student, exact=exact).map()


class CellFinder:
    """Finds the cell of any string.

    Args:
        exact: as in `CellMap.build`.
        led: a side whose next token still has to emit a blank that the other side has read, if any. What
            follows the blank in its tokens are its strings there, and names are in no cell.
        blank: the white space.
    """

    def __init__(
        self,
        teacher: TokenBytes,
        student: TokenBytes,
        *,
        exact: bool,
        led: Side | None = None,
        blank: bytes = b"",
    ) -> None:
        self._exact = exact
        self._tokens: dict[Side, TokenBytes] = {"teacher": teacher, "student": student}
        self._merges: dict[Side, Merges] = {"teacher": Merges(teacher), "student": Merges(student)}
        self._blanks: dict[Side, bytes] = {"teacher": b"", "student": b""}
        if led is not None:
            self._blanks[led] = blank
        self._found: dict[Side, dict[bytes, int]] = {"teacher": {}, "student": {}}
        names = _names(teacher).keys() & _names(student).keys() if led is None else set()
        theirs = {self._behind_blank(text, "student") for text in self._merges["student"].ids} - {b""}
        self._names: dict[bytes | None, int] = {}
        self._shared: dict[bytes, int] = {}
        cells = 0
        for number, content in enumerate(teacher.contents):
            if number in teacher.special:
                name = None if number == teacher.end_of_turn else content
                if name in names and name not in self._names:
                    self._names[name] = cells
                    cells += 1
            elif (text := self._behind_blank(content, "teacher")) in theirs and text not in self._shared:
                self._shared[text] = cells
                cells += 1

    def map(self) -> CellMap:
        """The cells of both vocabularies' ids."""
        teacher, student = self.of_ids("teacher"), self.of_ids("student")
        return CellMap(teacher, student, len(self._shared) + len(self._names), len(self._shared))

    def of_ids(self, side: Side) -> NDArray[np.int32]:
        """[V] int32: the cells of a vocabulary's ids."""
        tokens = self._tokens[side]
        cells = np.full(len(tokens), -1, np.int32)
        for number, content in enumerate(tokens.contents):
            if number not in tokens.special and (text := self._behind_blank(content, side)):
                cells[number] = self.of_text(text, side)
        for name, numbers in _names(tokens).items():
            cells[numbers] = self._names.get(name, -1)
        return cells

    def of_text(self, text: bytes, side: Side) -> int:
        """The cell of a text that a token of one side stands for; -1: it has none."""
        known: list[tuple[Side, bytes]] = []
        while (cell := self._shared.get(text, self._found[side].get(text))) is None:
            known.append((side, text))
            side = OTHER[side]
            first = None if self._exact else self._first(text, side)
            if not first:
                cell = -1
                break
            text = first
        for side, text in known:
            self._found[side][text] = cell
        return cell

    def _first(self, text: bytes, side: Side) -> bytes | None:
        """What the first token of a side's encoding stands for behind its blank, of blank and text."""
        first = self._merges[side].first(self._blanks[side] + text)
        return None if first is None else self._behind_blank(first, side)

    def _behind_blank(self, content: bytes, side: Side) -> bytes:
        """What of a token follows the blank that it has to begin with; b"" where it does not."""
        blank = self._blanks[side]
        return content[len(blank) :] if content.startswith(blank) else b""


def _names(tokens: TokenBytes) -> dict[bytes | None, list[int]]:
    """The ids of each name; that of the end-of-turn token is None, whatever its content."""
    names: dict[bytes | None, list[int]] = {}
    for number in sorted(tokens.special):
        name = None if number == tokens.end_of_turn else tokens.contents[number]
        if name != b"":
            names.setdefault(name, []).append(number)
    return names
