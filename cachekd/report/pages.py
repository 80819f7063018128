"""The pages of inspect and peek, and what all pages share: plots, colours, templates."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

from cachekd.cache import Manifest
from cachekd.cache.overview import Bar, entropy_bars, fingerprints, headline, measured_at, origin, part_bars
from cachekd.cache.summary import CacheSummary
from cachekd.report.peek import PeekedSample

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


def page_environment() -> jinja2.Environment:
    """Load templates of cachekd/report/templates; everything is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("cachekd.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


_COLOR = COLORS[RUN_COLORS[0]]
SHOWN_SHARDS = 200  # a page with all of ten thousand would be slow to open


def inspect_page(summary: CacheSummary) -> str:
    """Write the HTML of inspect's page."""
    with matplotlib.rc_context(STYLE):
        plots = {
            "parts": parts_plot(part_bars(summary), summary.tokens),
            "k": k_plot({"k": summary.k, "knee": summary.knee}),
            "entropy": entropy_plot(entropy_bars(summary.entropy)),
            "shards": shards_plots(summary),
        }
    return (
        page_environment()
        .get_template("inspect.html.jinja")
        .render(
            summary=summary,
            headline=headline(summary),
            origin=origin(summary.manifest),
            fingerprints=fingerprints(summary.manifest),
            measured_at=measured_at(summary.entropy, summary.tokens),
            plots=plots,
            shards=summary.shards[:SHOWN_SHARDS],
        )
    )


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


_TEMPLATES = files("cachekd.report") / "templates"


def peek_page(
    name: str, manifest: Manifest, samples: Sequence[PeekedSample], images: Sequence[Sequence[str]]
) -> str:
    """The page's HTML.

    Keys, texts and tokens come from data sets and caches of others. They are in the page as JSON that cannot
    end its element, the script puts them in as text, and the page's policy lets no other script run and
    nothing be fetched.

    Args:
        name: the cache's.
        images: of each sample, as data URIs.
    """
    data = [
        {**sample.model_dump(), "sources": list(sources)}
        for sample, sources in zip(samples, images, strict=True)
    ]
    script, style = (_TEMPLATES.joinpath(f"peek.{kind}").read_text("utf-8") for kind in ("js", "css"))
    return (
        page_environment()
        .get_template("peek.html.jinja")
        .render(
            name=name,
            manifest=manifest,
            data=embedded_json(data),
            script=script,
            style=style,
            script_hash=_policy_hash(script),
            style_hash=_policy_hash(style),
        )
    )


def embedded_json(value: object) -> str:
    """JSON that may stand in a <script> element: no character in it means anything to HTML."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy_hash(content: str) -> str:
    """Hash an inline script or style as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
