"""Everything that is drawn: figures as SVG, in the colours of the page that they stand in."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cachekd.cache.overview import Bar
from cachekd.cache.summary import CacheSummary
from cachekd.config.fields import PARTS
from cachekd.losses.terms import TERMS
from cachekd.report.runs import RUN_COLORS, Run

matplotlib.use("svg")

# The page's style sheet has the colours, for light and for dark; matplotlib wants some number for each.
_NAMES = ["plot-text", "plot-line", "teacher", "stored", *RUN_COLORS]
COLORS = {name: f"#0000{number:02x}" for number, name in enumerate(_NAMES, 1)}
WIDTH = 3.6  # inches, at which the page of a phone shows the text in its own size
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cachekd",  # the same page for the same run
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,  # points: 14 pixels, which a narrow column makes 12 at the least
    "lines.linewidth": 1.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLORS["plot-line"],
    "grid.color": COLORS["plot-line"],
    "text.color": COLORS["plot-text"],
    "axes.labelcolor": COLORS["plot-text"],
    "xtick.color": COLORS["plot-text"],
    "ytick.color": COLORS["plot-text"],
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def panel(height: float = 2.4) -> tuple[Any, Any]:
    """A figure and its axes; wider plots become several panels, which the page puts beside each other."""
    return pyplot.subplots(figsize=(WIDTH, height))


def count_in_whole(axis: Any) -> None:
    """Ticks of what is counted: no half steps, however few there are."""
    axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axis.set_major_formatter("{x:,.0f}")


def svg(figure: Any) -> str:
    """The figure as an <svg> element, its colours the page's."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")  # or `savefig` draws it once more, to nowhere, for a second layout
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = stream.getvalue()
    return re.sub(
        r"#0000([0-9a-f]{2})\b",
        lambda found: f"var(--{_NAMES[int(found[1], 16) - 1]})",
        text[text.index("<svg") :],
    )


def k_plot(histogram: Mapping[str, Mapping[Any, int]]) -> str:
    """How many logprobs a cache keeps per token, and how many Kneedle asked for.

    Args:
        histogram: as `LogitCache.histogram` gives it; the keys may be text, as in JSON.
    """
    figure, axes = panel()
    for name, label, color in (("k", "stored k", "stored"), ("knee", "Kneedle's k", RUN_COLORS[0])):
        values = [int(k) for k in histogram[name]]
        bins = [edge - 0.5 for edge in range(1, max(map(int, histogram["k"])) + 2)]
        style: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.6, "color": COLORS[color]}
        axes.hist(values, bins=bins, weights=list(histogram[name].values()), label=label, **style)
    axes.set(xlabel="k, logprobs per answer token", ylabel="answer tokens")
    count_in_whole(axes.xaxis)
    count_in_whole(axes.yaxis)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return svg(figure)


# ---- of a cache

_COLOR = COLORS[RUN_COLORS[0]]


def parts_plot(bars: list[Bar], tokens: int) -> str:
    """Draw the bytes per token by part."""
    figure, axes = panel(0.6 + 0.27 * len(bars))
    values = [bar.value / max(1, tokens) for bar in bars]
    drawn = axes.barh([bar.label for bar in bars], values, color=_COLOR)
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(xlabel="bytes per answer token")
    return svg(figure)


def entropy_plot(bars: list[Bar]) -> str:
    """Draw the tokens by entropy; the bins widen."""
    figure, axes = panel()
    axes.bar([bar.label for bar in bars], [bar.value for bar in bars], color=_COLOR, width=0.9)
    axes.tick_params(axis="x", labelrotation=90)
    axes.set(xlabel="entropy, nats", ylabel="answer tokens")
    count_in_whole(axes.yaxis)
    return svg(figure)


def shards_plots(summary: CacheSummary) -> dict[str, str]:
    """What differs from shard to shard, with its name: a shard that is unlike the others shows here."""
    if len(summary.shards) < 2:
        return {}
    columns: dict[str, list[Any]] = {
        "bytes per token": [shard.bytes / max(1, shard.tokens) for shard in summary.shards],
        "mean k": [shard.mean_k for shard in summary.shards],
        "answer's mean logprob": [shard.logprob for shard in summary.shards],
    }
    return {name: _by_shard(name, values) for name, values in columns.items()}


def _by_shard(name: str, values: list[Any]) -> str:
    figure, axes = panel(2.2)
    axes.plot(range(len(values)), values, color=_COLOR, marker="." if len(values) < 60 else "")
    axes.set(xlabel="shard", ylabel=name)
    axes.grid(axis="y")
    count_in_whole(axes.xaxis)
    return svg(figure)


# ---- of runs

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
    """Gradient norm and learning rate over the steps; and of each term, where a run logged it."""
    about = "the gradient of the term's mean per answer token, without its weight"
    terms = [
        _Curve(f"{term.label} at the {part.replace('_', ' ')}", about, "L2 norm", f"gradient_{name}_{part}")
        for name, term in TERMS.items()
        for part in PARTS
    ]
    return _panels([*_OPTIMIZER, *terms], runs)


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
        best = [point for point in points if style == "--" and point[0] == run.best_step]
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
