"""A pair that reads text in two ways, as tokenizers, chat templates or encodings differ: what of its answers
can be aligned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from cachekd.cache import LogitCache
from cachekd.cache.vocabulary import difference
from cachekd.check.rows import Row
from cachekd.check.side_by_side import Aligned, SideBySide
from cachekd.data import Encoded, Sample, Samples
from cachekd.data.sample import Preview
from cachekd.data.spread import spread
from cachekd.errors import BadSample, CachekdError
from cachekd.losses.terms import options_off
from cachekd.models import ModelFiles
from cachekd.vocabulary import VocabularyPair

ANSWERED_SAMPLES = 256  # whose answers are compared, by their texts alone
ENOUGH = 0.8  # of the student's answer tokens
_ALIGN = "train with --align-vocabulary cells"
_NAMED = 5  # samples in a row
_ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Shared:
    """What two vocabularies have in common.

    Attributes:
        teacher, student: how many tokens each has.
        strings: that both have, compared by their bytes.
        cells: classes of tokens of both, over which losses are computed.
    """

    teacher: int
    student: int
    strings: int
    cells: int


@dataclass(frozen=True)
class Across:
    """What is found of such a pair."""

    shared: Shared
    answers: Aligned

    @classmethod
    def of(
        cls,
        teacher: ModelFiles,
        student: ModelFiles,
        samples: Samples,
        read: list[tuple[Encoded, Encoded]],
    ) -> Across:
        """Compare the vocabularies, and answers from all over the data, read without their images.

        Args:
            read: samples as either side reads them in whole. They count where a model takes no text alone.
        """
        pair = VocabularyPair.of(teacher.token_bytes, student.token_bytes, "cells")
        shared = Shared(len(pair.teacher), len(pair.student), pair.cells.shared, pair.cells.cells)
        answers, sides = Aligned(), SideBySide(pair)
        for theirs, ours in list(_texts(teacher, student, samples)) or read:
            ids = theirs.token_ids.tolist(), ours.token_ids.tolist()
            answers.add(sides, ours.key, *ids, cut=theirs.cut or ours.cut)
        return cls(shared, answers)

    def vocabulary_row(self, row: Row) -> Row:
        """How many strings both have.

        Args:
            row: what is said of the tokenizers where both sides must have the same.
        """
        if row.state != "refused":
            return row
        shared = self.shared
        of_theirs, of_ours = (f"{shared.strings / max(1, n):.0%}" for n in (shared.teacher, shared.student))
        found = (
            f"{shared.teacher:,} tokens in the teacher's, {shared.student:,} in the student's; "
            f"{shared.strings:,} strings are in both, {of_theirs} of the one and {of_ours} of the other"
        )
        return Row(row.name, "note", found, _ALIGN)

    def answers_rows(self) -> list[Row]:
        """What is aligned of the answers, and whether both sides have the same."""
        return [self.aligned_row(), self.bytes_row()]

    def aligned_row(self) -> Row:
        """Which of the student's answer tokens a teacher with other tokens can teach."""
        name, found, tokens = "aligned answers", self.answers, max(1, self.answers.student_tokens)
        text = (
            f"{found.rows / tokens:.1%} of {found.student_tokens:,} answer tokens of the student's in "
            f"{found.samples:,} sample(s), {found.one_to_one / tokens:.1%} one to one; of the places where "
            f"both have read the same bytes, {found.rows / max(1, found.common):.1%} go on in one cell"
        )
        if found.rows >= ENOUGH * tokens:
            return Row(name, "ok", text)
        lost = "; ".join(f"{reason} {count / tokens:.1%}" for reason, count in found.lost.most_common())
        fix = (
            "nothing to do if this is intended: tokens that are not aligned learn from L_CE alone. Or take a "
            "student whose tokenizer cuts such text more like the teacher's"
        )
        return Row(name, "note", f"{text}; not aligned: {lost}", fix)

    def bytes_row(self) -> Row:
        """Samples whose answers are other bytes on the two sides, by name."""
        name, differing = "answers' bytes", self.answers.differing
        if not differing:
            return Row(name, "ok", f"the same on both sides in {self.answers.samples:,} sample(s)")
        named = [f"{key!r} ({how})" for key, how in islice(differing.items(), _NAMED)]
        more = [f"{len(differing) - _NAMED:,} more"] if len(differing) > _NAMED else []
        text = (
            f"{len(differing):,} of {self.answers.samples:,} sample(s) differ, and L_Align leaves them out: "
        )
        return Row(name, "note", text + "; ".join([*named, *more]), "nothing, if that is meant")


def unknown_bytes_row(error: CachekdError) -> Row:
    """A tokenizer that does not say which bytes its tokens stand for: nothing can be aligned by it."""
    row = Row.refused("vocabulary", error)
    return replace(row, fix=f"{options_off(['align'])}: L_VSD does not need it")


def as_note(row: Row, vocabulary: Row) -> Row:
    """What is refused where both sides must have the same tokens, as it is said of such a pair.

    Args:
        vocabulary: the row of the tokenizers: where they are the same, the pair may be made alike.
    """
    if row.state != "refused":
        return row
    fix = f"{_ALIGN}; or {row.fix}" if vocabulary.state == "ok" else _ALIGN
    return Row(row.name, "note", f"{row.problem}; the answers are found on both sides", fix)


def token_bytes_row(cache: LogitCache, teacher: ModelFiles) -> Row:
    """Whether the cache itself says what the teacher's tokens stand for."""
    name, stored = "cache: token bytes", cache.vocabulary
    if stored is None:
        found = "not in the cache, as it is an older one: training reads the teacher's tokenizer"
        return Row(name, "note", found, "nothing, where the teacher is at hand; else `cachekd dump` again")
    other = difference(stored, teacher.token_bytes)
    if other is None:
        return Row(name, "ok", f"of {len(stored):,} ids")
    error = CachekdError(
        "the cache's token ids stand for other bytes than the teacher's",
        where=f"{cache.path} and {teacher.path}",
        expected=other.expected,
        found=other.found,
        fix="run `cachekd dump` again",
    )
    return Row.refused(name, error)


def _texts(teacher: ModelFiles, student: ModelFiles, samples: Samples) -> Iterator[tuple[Encoded, Encoded]]:
    """Read the questions and answers of some samples; those that either side cannot read so are left out."""
    for index in islice(spread(len(samples)), ANSWERED_SAMPLES):
        try:
            sample = _text_alone(samples.keys[index], samples.preview(index))
            yield teacher.encoder(sample), student.encoder(sample)
        except BadSample:  # of which other rows tell, unless it is for the lack of its images
            continue


def _text_alone(key: str, preview: Preview) -> Sample:
    """A sample's questions and answers, without images, a system text or tools."""
    said = ((role, text) for turn in preview.answered for role, text in zip(_ROLES, turn, strict=True))
    messages = ({"role": role, "content": [{"type": "text", "text": text}]} for role, text in said)
    return Sample(key, (), tuple(messages), "the texts of the data")
