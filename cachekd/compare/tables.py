"""From what was gathered to a comparison: means of every variant, and differences from the baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cachekd.compare.points import Gathered, Point
from cachekd.compare.results import (
    COSTS,
    METRICS,
    REFERENCES,
    Comparison,
    Difference,
    Reference,
    Row,
    Section,
    label_of,
)
from cachekd.compare.statistics import Mean, mean_of, paired_difference
from cachekd.errors import CachekdError, did_you_mean, nearest, some_of
from cachekd.evaluate import Evaluation, Score
from cachekd.evaluate.scores import paired_intervals


def compare(gathered: Gathered, *, baseline: str | None = None, metric: str = "exact_match") -> Comparison:
    """Tables of what there is.

    Args:
        baseline: a value of an axis; None: the one that was gathered, or else the first axis' first.
        metric: a name in `METRICS`.

    Raises:
        CachekdError: there is no such value, or no scores with this metric.
    """
    axis, value = _baseline(gathered, gathered.baseline if baseline is None else baseline)
    asked: dict[tuple[str, str], list[tuple[Point, Evaluation]]] = {}
    for point in gathered.points:
        for step, evaluation in point.evaluations.items():
            asked.setdefault((step, evaluation.asked.fingerprint), []).append((point, evaluation))
    sections = [
        _section(step, [_Scored.of(*one) for one in found], axis, value, metric, len(gathered.seeds))
        for (step, _), found in asked.items()
    ]
    if not any(metric in row.metrics for section in sections for row in section.rows):
        raise CachekdError(
            f"no evaluation has {METRICS[metric].label}",
            where="--metric",
            found=metric,
            fix="in the eval step blind needs `blind: true`; agreement and KL need `teacher` or `cache`",
        )
    return Comparison(
        pipeline=gathered.pipeline,
        axes=gathered.axes,
        axis=axis,
        baseline=value,
        metric=metric,
        unit=METRICS[metric].unit,
        seeds=gathered.seeds,
        sections=sections,
        left_out=gathered.left_out,
    )


def _baseline(gathered: Gathered, value: str | None) -> tuple[str | None, str | None]:
    if not gathered.axes:
        if value is None:
            return None, None
        raise CachekdError("nothing varies but the seed: there is no baseline", found=value)
    if value is None:
        axis, values = next(iter(gathered.axes.items()))
        return axis, values[0]
    for axis, values in gathered.axes.items():
        if value in values:
            return axis, value
    known = [one for values in gathered.axes.values() for one in values]
    raise CachekdError(
        "no axis has such a value to compare with",
        where="--baseline",
        expected=f"one of {some_of(known)}",
        found=value,
        fix=did_you_mean(nearest(value, known)),
    )


class _Scored(NamedTuple):
    """A point's own score on one set of questions."""

    point: Point
    evaluation: Evaluation
    score: Score

    @classmethod
    def of(cls, point: Point, evaluation: Evaluation) -> _Scored:
        return cls(point, evaluation, evaluation.models[0])

    def value(self, metric: str) -> float | None:
        """One of `METRICS`; None where the evaluation did not ask for it."""
        if metric == "blind":
            return None if self.score.blind is None else self.score.blind.exact_match
        return getattr(self.score, metric)

    def reference(self, name: str) -> float | None:
        """Exact match of one of `REFERENCES`; None where it was not asked."""
        found = getattr(self.evaluation, name)
        return None if found is None else found.exact_match


def _section(
    step: str, scored: list[_Scored], axis: str | None, baseline: str | None, metric: str, of_seeds: int
) -> Section:
    asked = scored[0].evaluation.asked
    variants: dict[str, list[_Scored]] = {}
    for one in scored:
        variants.setdefault(label_of(one.point.variant), []).append(one)
    pairs = list(_pairs(variants, axis, baseline)) if axis is not None and baseline is not None else []
    types = dict(sorted(asked.types.items(), key=lambda item: -item[1]))
    kinds = [None, *(types if metric in ("exact_match", "blind") else ())]
    found = [
        difference
        for ours, theirs in pairs
        for kind in kinds
        if (difference := _difference(ours, theirs, str(baseline), metric, kind, of_seeds)) is not None
    ]
    return Section(
        step=step,
        data=asked.data,
        fingerprint=asked.fingerprint,
        questions=asked.questions,
        samples=len(asked.per_sample),
        types=types,
        references={name: same for name in REFERENCES if (same := _same_everywhere(scored, name))},
        teachers=sorted({one.score.agrees_with for one in scored if one.score.agrees_with is not None}),
        over_cells=[label for label, group in variants.items() if any(one.score.over_cells for one in group)],
        rows=[_row(group) for group in variants.values()],
        differences=[one for one in found if one.type is None],
        by_type=[one for one in found if one.type is not None],
    )


def _same_everywhere(scored: Sequence[_Scored], name: str) -> Reference | None:
    found = [getattr(one.evaluation, name) for one in scored]
    if found[0] is None or any(one is None or one.correct != found[0].correct for one in found):
        return None
    return Reference(exact_match=found[0].exact_match, by_type=found[0].by_type)


def _row(group: list[_Scored]) -> Row:
    types = group[0].evaluation.asked.types
    costs = [one.point.cost for one in group]
    return Row(
        variant=group[0].point.variant,
        seeds=[one.point.seed for one in group],
        metrics=_means({name: [one.value(name) for one in group] for name in METRICS}),
        by_type=_means({kind: [one.score.by_type.get(kind) for one in group] for kind in types}),
        references=_means({name: [one.reference(name) for one in group] for name in REFERENCES}),
        cost=_means({name: [getattr(cost, name, None) for cost in costs] for name in COSTS}),
    )


def _means(values: dict[str, list[Any]]) -> dict[str, Mean]:
    """Means of what all of them have: one of some of them would be of other seeds than it says."""
    return {name: mean_of(each) for name, each in values.items() if None not in each}


def _pairs(
    variants: dict[str, list[_Scored]], axis: str, baseline: str
) -> Iterator[tuple[list[_Scored], list[_Scored]]]:
    """Every variant with the one that has the baseline's value, and all else alike, as far as seeds go."""
    for group in variants.values():
        variant = group[0].point.variant
        if variant[axis] == baseline:
            continue
        others = {one.point.seed: one for one in variants.get(label_of(variant | {axis: baseline}), [])}
        ours = [one for one in group if one.point.seed in others]
        if any(one.point.run != others[one.point.seed].point.run for one in ours):  # not one run for both
            yield ours, [others[one.point.seed] for one in ours]


def _difference(
    ours: list[_Scored], theirs: list[_Scored], against: str, metric: str, kind: str | None, of_seeds: int
) -> Difference | None:
    """None where the scores lack the metric, or are about different teachers or over different cells."""
    if metric in ("top1_agreement", "kl") and len({one.score.compared_by for one in (*ours, *theirs)}) > 1:
        return None
    values = [[_share(one, metric, kind) for one in side] for side in (ours, theirs)]
    if any(value is None for side in values for value in side):
        return None
    scale = METRICS[metric].scale
    mine, others = ([scale * value for value in side if value is not None] for side in values)
    found = paired_difference(mine, others)
    mean, half = found.mean, found.half_width
    low, high = (None, None) if half is None else (mean.mean - half, mean.mean + half)
    over: Literal["seeds", "samples"] = "seeds"
    if len(ours) == 1 and kind is None and metric in ("exact_match", "blind"):
        low, high = _over_samples(ours[0], theirs[0], metric)
        over = "samples"
    return Difference(
        variant=ours[0].point.variant,
        against=against,
        type=kind,
        difference=mean.mean,
        standard_error=mean.standard_error,
        low=low,
        high=high,
        over=over,
        seeds=[one.point.seed for one in ours],
        of_seeds=of_seeds,
    )


def _share(one: _Scored, metric: str, kind: str | None) -> float | None:
    if kind is None:
        return one.value(metric)
    score = one.score if metric == "exact_match" else one.score.blind
    return None if score is None else score.by_type.get(kind)


def _over_samples(ours: _Scored, theirs: _Scored, metric: str) -> tuple[float | None, float | None]:
    """The bootstrap over samples that `cachekd eval` shows of two models."""
    scores = [one.score if metric == "exact_match" else one.score.blind for one in (ours, theirs)]
    right = np.stack([score.right for score in scores if score is not None])
    [found] = paired_intervals(right, [(0, 1)], ours.evaluation.asked.per_sample)
    scale = METRICS[metric].scale
    return (
        (None, None) if found.low is None or found.high is None else (scale * found.low, scale * found.high)
    )
