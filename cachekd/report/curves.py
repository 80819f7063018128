"""The curves of a report: what was logged while the runs trained, in one colour for each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter

from cachekd.losses.terms import TERMS
from cachekd.report.pages import COLORS, count_in_whole, panel, svg
from cachekd.report.runs import Run

_FEW = 20  # points that are marked one by one: a line through one point is none
_LOG_FROM = 4.0  # largest to smallest value


@dataclass(frozen=True)
class Panel:
    """A plot with its title, and what it shows."""

    title: str
    about: str
    svg: str


@dataclass(frozen=True)
class _Curve:
    """What is drawn in a panel: names in the log, of training and of validation."""

    title: str
    about: str
    unit: str
    logged: str | None
    validated: str | None = None


_LOSS = "nats per answer token"
_VALIDATED = [
    _Curve("held-out loss", "the weighted sum of the terms", _LOSS, None, "eval_loss"),
    _Curve(
        "held-out accuracy",
        "share of answer tokens where the most probable one is right",
        "right answer tokens, %",
        None,
        "eval_token_accuracy",
    ),
]
_OPTIMIZER = [
    _Curve("gradient norm", "of all that trains, before the clip", "L2 norm", "grad_norm"),
    _Curve("learning rate", "of the optimizer", "learning rate", "learning_rate"),
]


def loss_panels(runs: Sequence[Run]) -> list[Panel]:
    """Each term over the steps, and what held-out data says, if there was any."""
    terms = [_Curve(term.label, term.about, _LOSS, name, f"eval_{name}") for name, term in TERMS.items()]
    return _panels([*terms, *_VALIDATED], runs)


def optimizer_panels(runs: Sequence[Run]) -> list[Panel]:
    """Gradient norm and learning rate over the steps."""
    return _panels(_OPTIMIZER, runs)


def best_step(run: Run) -> int | None:
    """The step whose weights did best on held-out data, where the run noted it."""
    step = run.saved.get("best_step")
    return None if step is None else int(step)


def _panels(curves: list[_Curve], runs: Sequence[Run]) -> list[Panel]:
    drawn = [(curve, _draw(curve, runs)) for curve in curves]
    return [Panel(curve.title, curve.about, plot) for curve, plot in drawn if plot is not None]


def _draw(curve: _Curve, runs: Sequence[Run]) -> str | None:
    """None where no run logged it. The first run is on top of the others."""
    lines = [
        (run, points, style)
        for run in reversed(runs)
        for points, style in (
            (_points(run.steps, curve.logged), "-"),
            (_points(run.validations, curve.validated), "--"),
        )
        if points
    ]
    if not lines:
        return None
    figure, axes = panel()
    for run, points, style in lines:
        few = "." if len(points) <= _FEW else None
        axes.plot(*zip(*points, strict=True), style, color=COLORS[run.color], marker=few)
        best = [point for point in points if style == "--" and point[0] == best_step(run)]
        if best:
            axes.plot(*best[0], "*", color=COLORS[run.color], markersize=12)
    axes.set(xlabel="optimizer step", ylabel=curve.unit)
    axes.grid(axis="y")
    count_in_whole(axes.xaxis)
    _scale(axes, [value for _, points, _ in lines for _, value in points], curve)
    return svg(figure)


def _points(entries: list[dict[str, float]], name: str | None) -> list[tuple[float, float]]:
    percent = 100 if name == "eval_token_accuracy" else 1
    return [(entry["step"], percent * entry[name]) for entry in entries if name is not None and name in entry]


def _scale(axes: Any, values: list[float], curve: _Curve) -> None:
    """A loss that falls by orders of magnitude is drawn so that its end can be seen."""
    if curve.unit == _LOSS and min(values) > 0 and max(values) / min(values) > _LOG_FROM:
        axes.set(yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
