"""`cachekd inspect` as one HTML page that stands alone."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib import pyplot

from cachekd.cache.summary import CacheSummary
from cachekd.describe import (
    Bar,
    entropy_bars,
    fingerprints,
    headline,
    measured_at,
    origin,
    part_bars,
)
from cachekd.plots import COLORS, STYLE, k_plot, page_environment, svg

SHOWN_SHARDS = 200  # a page with all of ten thousand would be slow to open


def inspect_page(summary: CacheSummary) -> str:
    """The page's HTML."""
    with matplotlib.rc_context(STYLE):
        plots = {
            "parts": parts_plot(part_bars(summary), summary.tokens),
            "k": k_plot({"k": summary.k, "knee": summary.knee}),
            "entropy": entropy_plot(entropy_bars(summary.entropy)),
            "shards": shards_plot(summary),
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
    figure, axes = pyplot.subplots(figsize=(6.2, 0.5 + 0.27 * len(bars)))
    values = [bar.value / max(1, tokens) for bar in bars]
    drawn = axes.barh([bar.label for bar in bars], values, color=COLORS["run"])
    axes.bar_label(drawn, fmt="%.2f", padding=3, color="#6b7280")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="bytes per answer token")
    return svg(figure)


def entropy_plot(bars: list[Bar]) -> str:
    """Tokens by entropy; the bins widen."""
    figure, axes = pyplot.subplots(figsize=(6.2, 2.1))
    axes.bar([bar.label for bar in bars], [bar.value for bar in bars], color=COLORS["teacher"], width=0.9)
    axes.tick_params(axis="x", labelrotation=40)
    axes.set(xlabel="entropy, nats", ylabel="answer tokens")
    return svg(figure)


def shards_plot(summary: CacheSummary) -> str | None:
    """What differs from shard to shard: a shard that is unlike the others shows here."""
    if len(summary.shards) < 2:
        return None
    figure, grid = pyplot.subplots(1, 3, figsize=(9.3, 1.9))
    columns: dict[str, list[Any]] = {
        "bytes per token": [shard.bytes / max(1, shard.tokens) for shard in summary.shards],
        "mean k": [shard.mean_k for shard in summary.shards],
        "mean logprob of the answer": [shard.logprob for shard in summary.shards],
    }
    for axes, (name, values) in zip(grid, columns.items(), strict=True):
        axes.plot(range(len(values)), values, color=COLORS["run"], marker="." if len(values) < 60 else "")
        axes.set(title=name, xlabel="shard")
    return svg(figure)
