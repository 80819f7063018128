"""What a comparison says in words: a sentence per difference, and what a reader has to know of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from cachekd.compare.results import COSTS, METRICS, REFERENCES, Comparison, Difference, Section
from cachekd.compare.statistics import Mean
from cachekd.evaluate.scores import MAX_TYPES

COST_UNITS = {"steps": "steps", "seconds": "seconds", "flops": "TFLOPs", "peak_bytes": "peak MB"}


def sentence(one: Difference, unit: str) -> str:
    """One difference as people say it; whether one is seen, its interval decides.

    >>> sentence(Difference(variant={"method": "align"}, against="ce", difference=1.2, standard_error=0.144,
    ...     low=0.8, high=1.6, over="seeds", seeds=[0, 1, 2, 3, 4], of_seeds=5), "points")
    'align: +1.2 ± 0.4 points over ce, 5 seeds'
    """
    seeds = _seeds(one)
    if one.low is None or one.high is None or one.low == one.high:  # no spread says nothing of a spread
        return _without_interval(one, unit, seeds)
    if one.over == "samples":
        digits = _digits(unit, (one.high - one.low) / 2)
        bounds = f"{_signed(one.low, digits)} to {_signed(one.high, digits)}"
        found = f"{_signed(one.difference, digits)} {unit} {_towards(one)} {one.against}"
        seen = "" if one.seen else ": no difference seen"
        return (
            f"{one.label}: {found} with one seed{seen} ({bounds} over the test's samples; another seed may "
            "say otherwise)"
        )
    half = (one.high - one.low) / 2
    digits = _digits(unit, half)
    found = f"{_signed(one.difference, digits)} ± {half:.{digits}f} {unit}"
    if one.seen:
        return f"{one.label}: {found} {_towards(one)} {one.against}, {seeds}"
    return f"{one.label}: no difference seen from {one.against} ({found}, {seeds})"


def _without_interval(one: Difference, unit: str, seeds: str) -> str:
    digits = _digits(unit, abs(one.difference))
    found = f"{_signed(one.difference, digits)} {unit} {_towards(one)} {one.against}"
    alone = len(one.seeds) == 1
    if abs(one.difference) < 1e-9:
        return f"{one.label}: the same as {one.against} with {'one seed' if alone else f'each of {seeds}'}"
    if alone:
        return f"{one.label}: {found} with one seed, so there is no interval"
    return f"{one.label}: {found} with each of {seeds} alike, so there is no interval"


def _seeds(one: Difference) -> str:
    there = len(one.seeds)
    return f"{there} seeds" if there == one.of_seeds else f"{there} of {one.of_seeds} seeds"


def _towards(one: Difference) -> str:
    return "over" if one.difference > 0 else "against"


def _digits(unit: str, size: float, least: int = 1) -> int:
    """As many as the interval deserves: one that is not 0 is not written as 0."""
    least = 4 if unit == "nats" else least
    return max(least, -math.floor(math.log10(size))) if size > 1e-12 else least


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def table_of_means(section: Section) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a row for every variant, and for what students are measured by; a column, where that
    differs from variant to variant."""
    metrics = [name for name in METRICS if any(name in row.metrics for row in section.rows)]
    costs = [name for name in COSTS if any(name in row.cost for row in section.rows)]
    differing = [
        name
        for name in REFERENCES
        if name not in section.references and any(name in row.references for row in section.rows)
    ]
    labels = [METRICS[name].label + (", nats" if METRICS[name].unit == "nats" else "") for name in metrics]
    columns = ["variant", "seeds", *labels, *differing, *(COST_UNITS[name] for name in costs)]
    rows = [
        [
            row.label,
            str(len(row.seeds)),
            *(metric_text(name, row.metrics.get(name)) for name in metrics),
            *(share_text(row.references.get(name)) for name in differing),
            *(cost_text(name, row.cost.get(name)) for name in costs),
        ]
        for row in section.rows
    ]
    empty = [""] * (len(columns) - 3)
    rows += [[name, "", _percent(one.exact_match), *empty] for name, one in section.references.items()]
    return columns, rows


def table_of_types(section: Section) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of exact match by question type, the most frequent types."""
    kinds = shown_types(section)
    columns = ["variant", *(f"{kind} ({section.types[kind]:,})" for kind in kinds)]
    rows = [[row.label, *(share_text(row.by_type.get(kind)) for kind in kinds)] for row in section.rows]
    rows += [
        [name, *(_percent(one.by_type.get(kind)) for kind in kinds)]
        for name, one in section.references.items()
    ]
    return columns, rows


def shown_types(section: Section) -> list[str]:
    """The most frequent question types, those that tables show."""
    return list(section.types)[:MAX_TYPES]


def notes(comparison: Comparison) -> list[str]:
    """What the figures mean and do not mean, in sentences."""
    return [*_of_baseline(comparison), *_of_intervals(comparison), *_of_questions(comparison.sections)]


def _of_baseline(comparison: Comparison) -> Iterator[str]:
    """Why there is no difference at all."""
    axis = comparison.axis
    rows = [row for section in comparison.sections for row in section.rows]
    if axis is not None and all(row.variant[axis] != comparison.baseline for row in rows):
        yield f"Nothing is compared: no run with the baseline, {comparison.baseline}, is finished."


def _of_intervals(comparison: Comparison) -> Iterator[str]:
    found = [one for section in comparison.sections for one in section.differences]
    over_seeds = [one for one in found if one.over == "seeds" and one.low is not None]
    if over_seeds:
        yield (
            "After ± in a sentence stands half the width of a 95 % interval: a paired t interval over seeds, "
            "between two variants with the same seeds. After ± in a table of means stands the standard "
            "error. If the interval contains 0, no difference is seen. The interval is about other seeds, "
            "with these test questions and this teacher. It says nothing about other questions."
        )
    if any(len(one.seeds) == 1 for one in found):
        yield (
            "With one seed an interval is a paired bootstrap over the test's samples. It is about these two "
            "students, and says nothing about another seed. For that use three seeds or more (`seeds: 5`)."
        )
    of_types = [one for section in comparison.sections for one in section.by_type if one.low is not None]
    many = len([one for one in found if one.low is not None]) + len(of_types)
    if many > 1:
        types = f", {len(of_types):,} of them by question type" if of_types else ""
        yield (
            f"{many:,} differences have an interval here{types}. Of twenty such intervals one misses by "
            f"chance: where nothing differs at all, about {max(1, round(many / 20)):,} of these would still "
            "show a difference. One that stands out alone among many is a reason to try other seeds."
        )


def _of_questions(sections: list[Section]) -> Iterator[str]:
    for step in dict.fromkeys(section.step for section in sections):
        sets = [section for section in sections if section.step == step]
        if len(sets) > 1:
            yield (
                f"Step {step} asked {len(sets)} different sets of questions. Each has tables of its own, and "
                "nothing is compared between them."
            )
    if any(len(section.teachers) > 1 for section in sections):
        yield (
            "Agreement and KL are with each student's own teacher. They are not compared between students "
            "of different teachers."
        )
    if over_cells := list(dict.fromkeys(label for section in sections for label in section.over_cells)):
        yield (
            f"Agreement and KL of {'; '.join(over_cells)} are over cells, at the places where student and "
            "teacher have read the same bytes, because their tokenizers differ. They are not compared with "
            "those of a student with another tokenizer."
        )


# ---- numbers


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def share_text(mean: Mean | None) -> str:
    """A share with its standard error, in percent."""
    return "" if mean is None else _with_error(100 * mean.mean, _scaled(mean.standard_error, 100), 2) + " %"


def metric_text(name: str, mean: Mean | None) -> str:
    """A number of `METRICS` with its standard error."""
    if mean is None or METRICS[name].scale == 100:
        return share_text(mean)
    return _with_error(mean.mean, mean.standard_error, 4)


def cost_text(name: str, mean: Mean | None) -> str:
    """A number of `COSTS`, the mean alone, in the unit that `COST_UNITS` says."""
    if mean is None:
        return ""
    if name == "flops":
        return f"{mean.mean / 1e12:,.4g}"
    return f"{mean.mean / 1e6 if name == 'peak_bytes' else mean.mean:,.{1 if name == 'seconds' else 0}f}"


def interval_text(one: Difference, unit: str) -> str:
    """The bounds of an interval."""
    if one.low is None or one.high is None:
        return "none"
    digits = _digits(unit, (one.high - one.low) / 2, 2)
    return f"{_signed(one.low, digits)} to {_signed(one.high, digits)}"


def difference_text(one: Difference, unit: str) -> str:
    """A difference, in the metric's unit."""
    return _signed(one.difference, _digits(unit, abs(one.difference), 2))


def seen_text(one: Difference) -> str:
    """Whether a difference is seen."""
    return {True: "yes", False: "no difference seen", None: "not known"}[one.seen]


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value
