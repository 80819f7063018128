"""How the HTML pages draw: inline SVG that reads on light and on dark, on a phone and on a desk."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

matplotlib.use("svg")

RUN_COLORS = [f"run-{number}" for number in range(1, 9)]
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


def count_in_whole(axis: Any, ticks: int = 5) -> None:
    """Ticks of what is counted: no half steps, however few there are."""
    axis.set_major_locator(MaxNLocator(ticks, integer=True, min_n_ticks=1))
    axis.set_major_formatter("{x:,.0f}")


def svg(figure: Any) -> str:
    """The figure as an <svg> element, its colours the page's."""
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


def page_environment() -> jinja2.Environment:
    """For cachekd/templates: everything is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("cachekd", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
