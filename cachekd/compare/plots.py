"""Learning curves, differences along them, and accuracy against what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.ticker import NullFormatter

from cachekd.compare.results import METRICS, Comparison, Difference, Row, Section, Variant
from cachekd.report.plots import COLORS, STYLE, Panel, panel, svg
from cachekd.report.runs import RUN_COLORS

_STROKES = ("-", "--", ":", "-.")  # beyond eight lines the colours come again
_LOG_FROM = 4.0  # largest to smallest value of an axis


class Spot(NamedTuple):
    """A point of a line, with what reaches down and up from it."""

    x: float
    y: float
    down: float
    up: float


Lines = dict[str, list[Spot]]


def panels(section: Section, comparison: Comparison) -> list[Panel]:
    """Every plot of a section that there is something for."""
    with matplotlib.rc_context(STYLE):
        return [*_curves(section, comparison), *_against_cost(section, comparison)]


def number_in(value: str) -> float | None:
    """The number that a value of an axis is, such as 250 of `limit=250`; None where it is none."""
    try:
        return float(value.rpartition("=")[2])
    except ValueError:
        return None


def numeric_axes(axes: Mapping[str, Sequence[str]]) -> list[str]:
    """Axes whose values are all numbers."""
    return [name for name, values in axes.items() if len(values) > 1 and None not in map(number_in, values)]


def curve_of(rows: Sequence[Row], axis: str, metric: str) -> Lines:
    """Means over seeds with their standard errors along an axis, a line for each variant of the others."""
    found = [(row.variant, row.metrics[metric]) for row in rows if metric in row.metrics]
    scale = METRICS[metric].scale
    errors = [scale * (mean.standard_error or 0.0) for _, mean in found]
    return _lines(
        (variant, axis, Spot(_number(variant, axis), scale * mean.mean, error, error))
        for (variant, mean), error in zip(found, errors, strict=True)
    )


def differences_along(differences: Sequence[Difference], axis: str) -> Lines:
    """Differences from the baseline with their 95 % intervals along an axis."""
    return _lines(
        (one.variant, axis, Spot(_number(one.variant, axis), one.difference, *_reach(one)))
        for one in differences
    )


def _reach(one: Difference) -> tuple[float, float]:
    if one.low is None or one.high is None:
        return 0.0, 0.0
    return one.difference - one.low, one.high - one.difference


def _number(variant: Variant, axis: str) -> float:
    return number_in(variant[axis]) or 0.0


def _lines(spots: Iterator[tuple[Variant, str | None, Spot]]) -> Lines:
    lines: Lines = {}
    for variant, axis, spot in spots:
        rest = ", ".join(value for name, value in variant.items() if name != axis)
        lines.setdefault(rest, []).append(spot)
    return {name: sorted(line) for name, line in lines.items()}


def _curves(section: Section, comparison: Comparison) -> Iterator[Panel]:
    metric = METRICS[comparison.metric]
    for axis in numeric_axes(comparison.axes):
        curve, label = curve_of(section.rows, axis, comparison.metric), axis.rpartition(".")[2]
        if curve:
            drawn = _draw(curve, list(curve), label, _unit(comparison.metric))
            yield Panel(f"{metric.label} over {axis}", "mean over seeds, bars: standard error", drawn)
        if along := differences_along(section.differences, axis):
            drawn = _draw(along, list(curve), label, comparison.unit, zero=True)
            title = f"difference from {comparison.baseline} over {axis}"
            yield Panel(title, "bars: 95 % interval, where there is one", drawn)


def _against_cost(section: Section, comparison: Comparison) -> Iterator[Panel]:
    """Nothing where operations are not known or all alike, or there are more lines than colours."""
    axis, metric = next(iter(numeric_axes(comparison.axes)), None), comparison.metric
    rows = [row for row in section.rows if metric in row.metrics and row.cost.get("flops")]
    flops = [row.cost["flops"].mean for row in rows]
    scale = METRICS[metric].scale
    lines = _lines(
        (row.variant, axis, Spot(cost, scale * row.metrics[metric].mean, 0.0, 0.0))
        for row, cost in zip(rows, flops, strict=True)
    )
    if flops and max(flops) > 1.01 * min(flops) and len(lines) <= len(RUN_COLORS):
        drawn = _draw(lines, list(lines), "FLOPs of the whole training", _unit(metric), ticks=False)
        yield Panel(f"{METRICS[metric].label} against cost", "means over seeds", drawn)


def _draw(lines: Lines, names: list[str], x: str, y: str, *, ticks: bool = True, zero: bool = False) -> str:
    """A figure; a line's colour is the place of its name among `names`."""
    figure, axes = panel(2.8)
    for name, line in lines.items():
        place = names.index(name)
        axes.errorbar(
            [spot.x for spot in line],
            [spot.y for spot in line],
            [[spot.down for spot in line], [spot.up for spot in line]],
            label=name,
            color=COLORS[RUN_COLORS[place % len(RUN_COLORS)]],
            linestyle=_STROKES[place // len(RUN_COLORS) % len(_STROKES)],
            marker=".",
            capsize=2,
        )
    _scale(axes, sorted({spot.x for line in lines.values() for spot in line}), ticks)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="y")
    if zero:
        axes.axhline(0.0, color=COLORS["plot-text"], linewidth=0.8)
    if any(lines):
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return svg(figure)


def _scale(axes: Any, where: list[float], ticks: bool) -> None:
    """What doubles from one value to the next is drawn so that all of them can be told apart."""
    if where[0] > 0 and where[-1] / where[0] > _LOG_FROM:
        axes.set(xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if ticks:
        axes.set_xticks(where, [f"{x:,g}" for x in where])


def _unit(metric: str) -> str:
    return f"{METRICS[metric].label}, {'%' if METRICS[metric].scale == 100 else 'nats'}"
