"""Learning curves, and accuracy against what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.ticker import NullFormatter

from cachekd.compare.statistics import Mean
from cachekd.compare.tables import METRICS, Row, Section
from cachekd.report.plots import COLORS, STYLE, Panel, panel, svg
from cachekd.report.runs import RUN_COLORS

_LINES = ("-", "--", ":", "-.")
_LOG_FROM = 4.0  # largest to smallest value of an axis


def color_of(index: int) -> str:
    """The name, in the style sheet, of a variant's colour; beyond eight they come again, with other lines."""
    return RUN_COLORS[index % len(RUN_COLORS)]


def curves(section: Section, axes: dict[str, list[str]], metric: str) -> Iterator[Panel]:
    """The metric over every axis whose values are numbers: a line for each variant of the other axes."""
    with matplotlib.rc_context(STYLE):
        for axis, values in axes.items():
            if _are_numbers(values):
                drawn = _curve(section.rows, axis, metric)
                title = f"{METRICS[metric].label} over {axis}"
                yield Panel(title, "mean over seeds, bars are the standard error", drawn)


def number_in(value: str) -> float | None:
    """The number that a value of an axis is, such as 250 of `limit=250`; None where it is none."""
    try:
        return float(value.rpartition("=")[2])
    except ValueError:
        return None


def lines_of(rows: Sequence[Row], axis: str) -> dict[str, list[tuple[float, Row]]]:
    """The points of each line, in the order of the axis."""
    lines: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        rest = ", ".join(value for name, value in row.variant.items() if name != axis)
        lines.setdefault(rest, []).append((number_in(row.variant[axis]) or 0.0, row))
    return {name: sorted(line, key=lambda point: point[0]) for name, line in lines.items()}


def _curve(rows: Sequence[Row], axis: str, metric: str) -> str:
    figure, axes = panel(2.8)
    lines = lines_of(rows, axis)
    for index, (name, line) in enumerate(lines.items()):
        points = [(x, row.metrics[metric]) for x, row in line if metric in row.metrics]
        _errorbar(axes, index, name, points, metric)
    where = [x for line in lines.values() for x, _ in line]
    axes.set(xlabel=axis.rpartition(".")[2], ylabel=_unit(metric))
    _ticks(axes, sorted(set(where)))
    if any(lines):
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return svg(figure)


def cost_plot(section: Section, axes: dict[str, list[str]], metric: str) -> Panel | None:
    """The metric against floating point operations: a line over the first axis of numbers for each variant of
    the others, or else a point for each. None where operations are not known or all alike, or there are more
    lines than colours."""
    rows = [row for row in section.rows if metric in row.metrics and row.cost.get("flops")]
    numbers = next((axis for axis, values in axes.items() if _are_numbers(values)), None)
    lines = {row.label: [row] for row in rows}
    if numbers is not None:
        lines = {name: [row for _, row in line] for name, line in lines_of(rows, numbers).items()}
    flops = [row.cost["flops"].mean for row in rows]
    if not flops or max(flops) < 1.01 * min(flops) or len(lines) > len(RUN_COLORS):
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes_ = panel(2.8)
        for index, (name, line) in enumerate(lines.items()):
            _errorbar(
                axes_, index, name, [(row.cost["flops"].mean, row.metrics[metric]) for row in line], metric
            )
        axes_.set(xlabel="FLOPs of the whole training", ylabel=_unit(metric))
        if max(flops) / min(flops) > _LOG_FROM:
            axes_.set(xscale="log")
        axes_.grid(axis="y")
        if any(lines):
            figure.legend(loc="outside upper center", ncols=2, frameon=False)
        drawn = svg(figure)
    return Panel(f"{METRICS[metric].label} against cost", "mean over seeds", drawn)


def _errorbar(axes: Any, index: int, name: str, points: list[tuple[float, Mean]], metric: str) -> None:
    scale = METRICS[metric].scale
    axes.errorbar(
        [x for x, _ in points],
        [scale * mean.mean for _, mean in points],
        [scale * (mean.standard_error or 0.0) for _, mean in points],
        label=name,
        color=COLORS[color_of(index)],
        linestyle=_LINES[index // len(RUN_COLORS) % len(_LINES)],
        marker=".",
        capsize=2,
    )


def _are_numbers(values: Sequence[str]) -> bool:
    return len(values) > 1 and all(number_in(value) is not None for value in values)


def _ticks(axes: Any, where: list[float]) -> None:
    if where[0] > 0 and where[-1] / where[0] > _LOG_FROM:
        axes.set(xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(where, [f"{x:,g}" for x in where])
    axes.grid(axis="y")


def _unit(metric: str) -> str:
    return f"{METRICS[metric].label}, {'%' if METRICS[metric].scale == 100 else 'nats'}"
