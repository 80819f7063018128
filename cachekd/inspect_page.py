"""`cachekd inspect` as one HTML page that stands alone."""

from __future__ import annotations

from typing import Any

import matplotlib

from cachekd.cache.overview import Bar, entropy_bars, fingerprints, headline, measured_at, origin, part_bars
from cachekd.cache.summary import CacheSummary
from cachekd.plots import COLORS, RUN_COLORS, STYLE, count_in_whole, k_plot, page_environment, panel, svg

_COLOR = COLORS[RUN_COLORS[0]]
SHOWN_SHARDS = 200  # a page with all of ten thousand would be slow to open


def inspect_page(summary: CacheSummary) -> str:
    """The page's HTML."""
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
    """Bytes per token by part."""
    figure, axes = panel(0.6 + 0.27 * len(bars))
    values = [bar.value / max(1, tokens) for bar in bars]
    drawn = axes.barh([bar.label for bar in bars], values, color=_COLOR)
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(xlabel="bytes per answer token")
    return svg(figure)


def entropy_plot(bars: list[Bar]) -> str:
    """Tokens by entropy; the bins widen."""
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
