"""How the HTML pages draw: matplotlib as inline SVG that reads on light and on dark."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import jinja2
import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

COLORS = {"run": "#2563eb", "teacher": "#0f766e", "other": "#9ca3af"}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cachekd",  # the same page for the same run
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "text.color": "#6b7280",
    "axes.labelcolor": "#6b7280",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "figure.constrained_layout.use": True,  # panels beside each other keep off each other's labels
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def svg(figure: Any) -> str:
    """The figure as an <svg> element."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def k_plot(histogram: Mapping[str, Mapping[Any, int]]) -> str:
    """How many logprobs a cache keeps per token, and how many Kneedle asked for.

    Args:
        histogram: as `LogitCache.histogram` gives it; the keys may be text, as in JSON.
    """
    figure, axes = pyplot.subplots(figsize=(6.2, 2.1))
    for name, label, color in (("k", "stored k", COLORS["other"]), ("knee", "Kneedle's k", COLORS["run"])):
        values = [int(k) for k in histogram[name]]
        bins = [edge - 0.5 for edge in range(1, max(map(int, histogram["k"])) + 2)]
        style: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.6, "color": color, "label": label}
        axes.hist(values, bins=bins, weights=list(histogram[name].values()), **style)
    axes.set(xlabel="k", ylabel="answer tokens")
    axes.legend(frameon=False)
    return svg(figure)


def page_environment() -> jinja2.Environment:
    """For cachekd/templates: everything is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("cachekd", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
