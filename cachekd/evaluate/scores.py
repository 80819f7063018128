"""Scores of models, and how sure their differences are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from cachekd.cache.quantization import QuantizationInfo
from cachekd.data.left_out import LeftOutSamples

RESAMPLES = 2000
LEVEL = 0.95
FEWEST_SAMPLES = 10  # of less a percentile interval promises too much: of one sample it has no width
_AT_A_TIME = 2**23  # numbers drawn


class Interval(NamedTuple):
    """What a difference may be, with 95 % confidence; None of too few samples."""

    low: float | None
    high: float | None


def paired_intervals(
    right: NDArray[np.bool_], pairs: Sequence[tuple[int, int]], per_sample: Sequence[int]
) -> list[Interval]:
    """The 95 % intervals of differences between shares of right answers to the same questions.

    A bootstrap over samples: the questions about one picture are not independent of each other, so whole
    samples are drawn, with all their questions, and of all rows alike (Koehn 2004, paired; Efron's percentile
    interval). The same answers give the same intervals.

    Args:
        right: [R, Q] bool, which of the Q questions each of R rows answers rightly.
        pairs: rows, by their numbers.
        per_sample: [S], how many of the Q questions, in their order, are each sample's; each at least 1.

    Returns:
        for each pair (i, j), of `right[i].mean() - right[j].mean()`.
    """
    samples = len(per_sample)
    if samples < FEWEST_SAMPLES or not pairs:
        return [Interval(None, None)] * len(pairs)
    starts = np.concatenate([[0], np.cumsum(per_sample)[:-1]]).astype(np.int64)
    hits = np.add.reduceat(right.astype(np.int32), starts, axis=1)
    first, second = np.transpose(pairs)
    gained = (hits[first] - hits[second]).astype(np.float64)  # [pairs, S]
    asked = np.asarray(per_sample, np.float64)
    random = np.random.default_rng(0)
    found = []
    for start in range(0, RESAMPLES, some := max(1, _AT_A_TIME // samples)):
        rows = min(some, RESAMPLES - start)
        drawn = random.integers(samples, size=(rows, samples))
        drawn += np.arange(rows)[:, None] * samples
        times = np.bincount(drawn.ravel(), minlength=rows * samples).reshape(rows, samples).astype(np.float64)
        found.append((times @ gained.T) / (times @ asked)[:, None])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail], axis=0)
    return [Interval(*ends) for ends in zip(low.tolist(), high.tolist(), strict=True)]


MAX_TYPES = 12  # of questions in a table: data sets have hundreds


class CellCoverage(BaseModel):
    """What the agreement and KL of a model are over whose answers are other tokens than the teacher's.

    Attributes:
        tokenizer: the model's, its fingerprint. Two models of other tokenizers have other cells.
        compared: its answer tokens at which both have read the same bytes: over these the two are means.
        tokens: its answer tokens in all.
        differing: questions that are not among them, as the answer's bytes are others for the model.
        first: of up to 100 of these, sample and number to why.
    """

    model_config = ConfigDict(extra="forbid")

    tokenizer: str
    compared: int
    tokens: int
    differing: int = 0
    first: dict[str, str] = {}

    def __str__(self) -> str:
        return f"over cells, at {self.compared:,} of {self.tokens:,} answer tokens"


class Score(BaseModel):
    """One row: a model, or what stands for one, on a set of questions.

    Attributes:
        name: the model's path; of the prior, the data that its answers are from.
        exact_match: share of questions whose greedy answer is the true one.
        by_type: the same per question type, the first two words of the question.
        top1_agreement: share of answer tokens where model and teacher prefer the same one.
        kl: KL(teacher || model) in nats, mean over the answer tokens.
        agrees_with: the teacher of these two.
        over_cells: what these two are over, where the answers are other tokens for the teacher: they are of
            cells then, and not to be compared with those of tokens.
        correct: a character for each question, in the set's order: 1 where the answer is right, else 0.
        blind: the same model where every picture is replaced by its mean colour.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    exact_match: float
    by_type: dict[str, float]
    top1_agreement: float | None = None
    kl: float | None = None
    agrees_with: str | None = None
    over_cells: CellCoverage | None = None
    correct: str
    blind: Score | None = None

    @property
    def compared_by(self) -> tuple[str | None, str | None]:
        """Of two models that have this in common, agreement and KL may be compared: the teacher, and whose
        cells they are over."""
        return self.agrees_with, None if self.over_cells is None else self.over_cells.tokenizer

    @property
    def right(self) -> NDArray[np.bool_]:
        """[Q] bool, of `correct`."""
        return np.frombuffer(self.correct.encode(), np.uint8) == ord("1")


class Difference(BaseModel):
    """Two rows compared on the same questions.

    Attributes:
        row, against: their names, as `Evaluation.rows` has them.
        difference: share of right answers of the first less that of the second.
        low, high: its paired 95 % interval, see `paired_intervals`; None of too few samples.
    """

    model_config = ConfigDict(extra="forbid")

    row: str
    against: str
    difference: float
    low: float | None
    high: float | None

    @property
    def sure(self) -> bool:
        """Whether zero is outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


Named = tuple[str, Score]  # a row, by the name that it has there


def differences(pairs: Sequence[tuple[Named, Named]], per_sample: Sequence[int]) -> list[Difference]:
    """The first of each pair against the second.

    Args:
        per_sample: see `QuestionSet`.
    """
    rows = list({id(score): score for pair in pairs for _, score in pair}.values())
    places = {id(score): place for place, score in enumerate(rows)}
    right = np.stack([score.right for score in rows]) if rows else np.zeros((0, 0), bool)
    numbers = [(places[id(ours)], places[id(theirs)]) for (_, ours), (_, theirs) in pairs]
    intervals = paired_intervals(right, numbers, per_sample)
    return [
        Difference(
            row=row, against=against, difference=ours.exact_match - theirs.exact_match, **interval._asdict()
        )
        for ((row, ours), (against, theirs)), interval in zip(pairs, intervals, strict=True)
    ]


class QuestionSet(BaseModel):
    """The questions that were asked. Scores of different sets are not to be compared.

    Attributes:
        data: as it was named.
        fingerprint: sha256 over the key and content of every sample whose questions were asked, and over
            `history`. It does not change with the data's place, form or order.
        history: "none" or "full", what of a conversation stands before a question.
        questions: how many were asked.
        per_sample: how many about each sample, in the order of the samples' keys.
        types: how many of each type, all of them.
        unasked_answers: that follow no question, or another answer: nothing asks for them.
        left_out: samples none of whose questions was asked, for they are bad or too long.
    """

    model_config = ConfigDict(extra="forbid")

    data: str
    fingerprint: str
    history: str
    questions: int
    per_sample: list[int]
    types: dict[str, int]
    unasked_answers: int
    left_out: LeftOutSamples


class Evaluation(BaseModel):
    """Models on one set of questions.

    Attributes:
        asked: the questions.
        dtype: that the models ran in.
        at: when, in UTC, where a run keeps it.
        teacher: its row, if it was asked too.
        teacher_quantization: how the teacher's weights were quantised that models are compared with, asked or
            cached; None: they were not.
        models: a row each.
        prior: for each question the most frequent answer to the same question in other data.
        prior_left_out: records of these data in which nothing is asked and answered.
        differences: between rows, see `compared`.
    """

    model_config = ConfigDict(extra="forbid")

    asked: QuestionSet
    dtype: str
    at: str = ""
    teacher: Score | None = None
    teacher_quantization: QuantizationInfo | None = None
    models: list[Score]
    prior: Score | None = None
    prior_left_out: int = 0
    differences: list[Difference] = []

    @property
    def rows(self) -> Iterator[tuple[str, Score]]:
        """Every row with its name: the teacher, each model and the same without pictures, the prior."""
        if self.teacher is not None:
            yield f"teacher {self.teacher.name}", self.teacher
        for model in self.models:
            yield model.name, model
            if model.blind is not None:
                yield f"{model.name}, blind", model.blind
        if self.prior is not None:
            yield "prior", self.prior

    def compared(self) -> Evaluation:
        """Compare every two models, and each model with the other rows: the teacher, itself without pictures,
        the prior."""
        names = {id(score): name for name, score in self.rows}
        pairs: list[tuple[Score, Score | None]] = []
        for place, model in enumerate(self.models):
            pairs += [(model, other) for other in self.models[:place]]
            pairs += [(model, other) for other in (self.teacher, model.blind, self.prior)]
        named = [
            ((names[id(one)], one), (names[id(other)], other)) for one, other in pairs if other is not None
        ]
        return self.model_copy(update={"differences": differences(named, self.asked.per_sample)})

    def summary(self) -> dict[str, Any]:
        """Return what scripts get: everything but the answers to single questions."""
        row: Any = {"correct": True, "blind": {"correct"}}
        return self.model_dump(
            mode="json",
            exclude={
                "asked": {"per_sample"},
                "teacher": row,
                "models": {"__all__": row},
                "prior": row,
            },
        )
