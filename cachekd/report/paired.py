"""The answer tokens of a cache's samples beside those of a student with another tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from cachekd.cache.sealed import Part
from cachekd.check.side_by_side import Place, SideBySide, State
from cachekd.data.left_out import reason_of
from cachekd.data.sample import Sample
from cachekd.errors import BadSample
from cachekd.models import ModelFiles
from cachekd.report.token_texts import TokenTexts, text_of
from cachekd.vocabulary import Lead, TokenBytes, VocabularyPair
from cachekd.vocabulary.pieces import Reader

END_OF_TURN = "end of turn"


class StudentToken(Part):
    """An answer token as the student has it."""

    id: int
    text: str


class PairedPlace(Part):
    """A place in an answer where a token of the teacher's or of the student's begins, or one of each."""

    teacher: int | None = Field(description="which answer token, from 0; null: none begins here")
    student: int | None = Field(description="likewise")
    state: State
    teacher_cell: str | None = Field(description="the string that its cell is named by; null: it is in none")
    student_cell: str | None = Field(description="likewise")


class Paired(Part):
    """A sample's answer tokens beside the student's."""

    student: str = Field(description="folder or hub name")
    tokens: list[StudentToken]
    places: list[PairedPlace] = Field(description="in the order of the text; none where `differs` says why")
    aligned: int = Field(description="places where both are taught alike")
    differs: str | None = Field(description="how the answers' bytes differ; null: they do not")


class PairedStudent:
    """Reads answers as a student does, and lays its tokens beside the cache's.

    Args:
        student: a model whose tokenizer may be another than the teacher's.
        teacher: what the cache's tokens stand for.
    """

    def __init__(self, student: ModelFiles, teacher: TokenBytes) -> None:
        self._student, self._teacher = student, Reader(teacher)
        self._pair = VocabularyPair.of(teacher, student.token_bytes, "cells")
        self._sides = SideBySide(self._pair)
        self._texts = TokenTexts(vocabulary=student.token_bytes)

    def beside(
        self, key: str, token_ids: Sequence[int], sample: Sample | None = None, *, cut: bool = False
    ) -> Paired:
        """Lay the answer tokens of a sample beside the student's.

        Args:
            token_ids: of the cache.
            sample: with this key; None: the answers are read from the tokens, behind questions of no words.
            cut: whether the cache may lack the end of the answers.
        """
        try:
            encoded = self._student.encoder(self._readable(key, token_ids, sample))
        except BadSample as error:
            return self._paired([], [], 0, f"the student cannot read the sample: {reason_of(error)}")
        ids = encoded.token_ids.tolist()
        found = self._pair.aligned(token_ids, ids, cut=cut or encoded.cut)
        if found.differs is not None:
            return self._paired(ids, [], 0, found.differs)
        places = self._sides.places(token_ids, ids, found)
        aligned = sum(place.state == "aligned" for place in places)
        return self._paired(ids, [self._place(place, token_ids, ids) for place in places], aligned, None)

    def _paired(
        self, ids: Sequence[int], places: list[PairedPlace], aligned: int, differs: str | None
    ) -> Paired:
        tokens = [StudentToken(id=token, text=self._texts[token]) for token in ids]
        return Paired(
            student=self._student.path, tokens=tokens, places=places, aligned=aligned, differs=differs
        )

    def _readable(self, key: str, token_ids: Sequence[int], sample: Sample | None) -> Sample:
        """The sample, without pictures where the student takes none."""
        if sample is None:
            return Sample(key, (), tuple(self._messages(token_ids)), "the cache's answers")
        if self._student.image_token_id is not None:
            return sample
        messages = (
            {**turn, "content": [part for part in turn["content"] if part["type"] == "text"]}
            for turn in sample.messages
        )
        return replace(sample, images=(), messages=tuple(messages))

    def _messages(self, token_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
        """A conversation of these answers."""
        texts = [b""]
        for piece in self._teacher.pieces(token_ids, joined=False):
            ends = piece.name is not None and piece.name == self._pair.teacher.end_of_turn
            name = b"" if piece.name is None or ends else self._pair.teacher.contents[piece.name]
            texts[-1] += piece.text + name
            texts += [b""] * ends
        for text in texts:
            if answer := text.decode(errors="ignore").strip():  # one that was cut may end inside a character
                for role, said in (("user", "?"), ("assistant", answer)):
                    yield {"role": role, "content": [{"type": "text", "text": said}]}

    def _place(self, place: Place, theirs: Sequence[int], ours: Sequence[int]) -> PairedPlace:
        cells = self._pair.cells_after(place.lead)
        return PairedPlace(
            teacher=place.teacher,
            student=place.student,
            state=place.state,
            teacher_cell=None
            if place.teacher is None
            else self._name(cells.teacher[theirs[place.teacher]], place.lead),
            student_cell=None
            if place.student is None
            else self._name(cells.student[ours[place.student]], place.lead),
        )

    def _name(self, cell: int, lead: Lead) -> str | None:
        """What a cell is named by: the string that both have, with which all of its tokens begin."""
        if cell == -1:
            return None
        cells = self._pair.cells_after(lead)
        whole = self._pair.student if lead.side == "teacher" else self._pair.teacher  # without a blank
        ids = cells.student if lead.side == "teacher" else cells.teacher
        members = np.flatnonzero(ids == cell).tolist()
        if whole.end_of_turn in members:
            return END_OF_TURN
        contents = whole.contents
        token = min(members, key=lambda one: len(contents[one]))
        return text_of(contents[token], token)
