"""What a comparison finds, as its JSON has it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from cachekd.compare.statistics import Mean

Variant = dict[str, str]  # by axis, the value's name


class Metric(NamedTuple):
    """A number of a score.

    Attributes:
        label: for tables.
        unit: that differences are in.
        scale: from a score to that unit.
    """

    label: str
    unit: str
    scale: float


METRICS = {
    "exact_match": Metric("exact match", "points", 100),
    "blind": Metric("exact match, blind", "points", 100),
    "top1_agreement": Metric("agrees with teacher", "points", 100),
    "kl": Metric("KL", "nats", 1),
}
REFERENCES = ("teacher", "prior")  # what students are measured by: rows of an evaluation
COSTS = ("steps", "seconds", "flops", "peak_bytes")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Row(_Model):
    """A variant.

    Attributes:
        variant: by axis, the value.
        seeds: whose scores these are.
        metrics: by the names in `METRICS`, those that there are: shares, and nats.
        by_type: exact match by question type.
        references: exact match of `REFERENCES`, on the same questions.
        cost: by the names in `COSTS`, those that are known: optimizer steps, seconds, floating point
            operations, bytes.
    """

    variant: Variant
    seeds: list[int | None]
    metrics: dict[str, Mean]
    by_type: dict[str, Mean]
    references: dict[str, Mean]
    cost: dict[str, Mean]

    @property
    def label(self) -> str:
        return label_of(self.variant)


class Difference(_Model):
    """A variant less the baseline, with the same seeds and the same values of the other axes.

    Attributes:
        variant: the one that is compared.
        against: the baseline's value.
        type: of the questions; None: all.
        difference: in the metric's unit, the mean over seeds, as the next three.
        standard_error: of that; None of one seed.
        low, high: its 95 % interval; None where there is none.
        over: what the interval is over: "seeds" (t, paired), or the test's "samples" where there is one seed
            (`paired_intervals`): then it is about these two students alone.
        seeds: of both.
        of_seeds: how many there are to be, when all is done.
    """

    variant: Variant
    against: str
    type: str | None = None
    difference: float
    standard_error: float | None
    low: float | None
    high: float | None
    over: Literal["seeds", "samples"]
    seeds: list[int | None]
    of_seeds: int

    @property
    def label(self) -> str:
        return label_of(self.variant)

    @property
    def seen(self) -> bool | None:
        """Whether zero is outside the interval; None where there is none."""
        return None if self.low is None or self.high is None else not self.low <= 0 <= self.high


class Reference(_Model):
    """A row of `REFERENCES` that is the same at all points: shares of right answers."""

    exact_match: float
    by_type: dict[str, float]


class Section(_Model):
    """Scores on one set of questions.

    Attributes:
        step: the eval step.
        data: as it was named.
        fingerprint: of the questions.
        questions, samples: how many.
        types: how many questions of each type, the most frequent first.
        references: the teacher, and the most frequent answers in other data; without what differs from point
            to point, as a teacher does that is an axis: rows have that.
        teachers: that the students' agreement is with.
        over_cells: variants whose agreement and KL are over cells, at some of the answer tokens: these are
            other tokens for the teacher.
        differences: from the baseline, all questions.
        by_type: the same for each type.
    """

    step: str
    data: str
    fingerprint: str
    questions: int
    samples: int
    types: dict[str, int]
    references: dict[str, Reference]
    teachers: list[str]
    over_cells: list[str] = []
    rows: list[Row]
    differences: list[Difference]
    by_type: list[Difference]


class LeftOut(_Model):
    """A point that is in no table, or in fewer, and why."""

    point: str
    why: str


class Comparison(_Model):
    """Everything that `cachekd compare` finds.

    Attributes:
        pipeline: its folder.
        axes: each with its values.
        baseline: the value that others are compared with, and its axis.
        metric: that differences are of.
        left_out: what is not in the tables.
        seeds: of the pipeline.
    """

    pipeline: str
    axes: dict[str, list[str]]
    axis: str | None
    baseline: str | None
    metric: str
    unit: str
    seeds: list[int | None]
    sections: list[Section]
    left_out: list[LeftOut]


def label_of(variant: Variant) -> str:
    """A variant's name: its values. One without axes is called as what it is."""
    return ", ".join(variant.values()) or "all seeds"
