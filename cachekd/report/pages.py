"""The HTML pages: of a run beside others, of a cache (`inspect`), of its samples (`peek`)."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib

from cachekd.atomic import require_place, write_file
from cachekd.cache import Manifest
from cachekd.cache.overview import (
    contents,
    entropy_bars,
    fidelity,
    fingerprints,
    headline,
    measured_at,
    origin,
    part_bars,
)
from cachekd.cache.summary import CacheSummary
from cachekd.evaluate.scores import MAX_TYPES
from cachekd.paths import REPORT_FILE
from cachekd.report.accuracy import difference_text, sections, verdict
from cachekd.report.benchmarks import benchmark_table
from cachekd.report.plots import (
    STYLE,
    entropy_plot,
    k_plot,
    loss_panels,
    optimizer_panels,
    parts_plot,
    shards_plots,
)
from cachekd.report.runs import Run, read_run, settings_of, term_shares, told_apart

if TYPE_CHECKING:
    from cachekd.report.peek import PeekedSample

SHOWN_SHARDS = 200  # a page with all of ten thousand would be slow to open
_TEMPLATES = files("cachekd.report") / "templates"


def page_environment() -> jinja2.Environment:
    """Load templates of cachekd/report/templates; everything is escaped, as HTML or as JSON in a script."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cachekd.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # which browsers do not read
    return environment


def _render(template: str, **values: Any) -> str:
    return page_environment().get_template(f"{template}.html.jinja").render(values)


# ---- of a run


def write_report(
    folder: str | Path, baselines: Sequence[str | Path] = (), out: str | Path | None = None
) -> Path:
    """Write the page, by default into the run's folder; returns where it is.

    Raises:
        CachekdError: as `read_run` and `build_report`; or the page cannot be written.
    """
    out = Path(folder) / REPORT_FILE if out is None else Path(out)
    require_place(out)
    page = build_report(read_run(folder), [read_run(baseline) for baseline in baselines])
    write_file(out, page.encode())
    return out


def build_report(run: Run, baselines: Sequence[Run]) -> str:
    """The page's HTML.

    Raises:
        CachekdError: a baseline was scored on other questions than the run, is the run itself, or there are
            too many of them.
    """
    runs = told_apart([run, *baselines])
    run = runs[0]
    found = sections(runs)
    with matplotlib.rc_context(STYLE):
        plots = {
            "losses": loss_panels(runs),
            "optimizer": optimizer_panels(runs),
            "k": k_plot(run.saved["k_histogram"]) if run.saved["k_histogram"] else None,
        }
    settings, other_settings = settings_of(runs)
    manifest = Manifest.model_validate(run.saved["cache"]) if run.saved["cache"] else None
    return _render(
        "report",
        run=run,
        runs=runs,
        verdict=verdict(runs, found),
        sections=found,
        benchmarks=benchmark_table(runs),
        difference_text=difference_text,
        max_types=MAX_TYPES,
        plots=plots,
        shares=term_shares(run),
        cache=contents(manifest) | origin(manifest) | fidelity(manifest) if manifest else None,
        fingerprints=fingerprints(manifest) if manifest else None,
        settings=settings,
        other_settings=other_settings,
    )


# ---- of a cache


def inspect_page(summary: CacheSummary) -> str:
    """Write the HTML of inspect's page."""
    with matplotlib.rc_context(STYLE):
        plots = {
            "parts": parts_plot(part_bars(summary), summary.tokens),
            "k": k_plot({"k": summary.k, "knee": summary.knee}),
            "entropy": entropy_plot(entropy_bars(summary.entropy)),
            "shards": shards_plots(summary),
        }
    return _render(
        "inspect",
        summary=summary,
        headline=headline(summary),
        origin=origin(summary.manifest),
        fingerprints=fingerprints(summary.manifest),
        measured_at=measured_at(summary.entropy, summary.tokens),
        plots=plots,
        shards=summary.shards[:SHOWN_SHARDS],
    )


# ---- of samples


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
    return _render(
        "peek",
        name=name,
        manifest=manifest,
        data=data,
        script=script,
        style=style,
        script_hash=_policy_hash(script),
        style_hash=_policy_hash(style),
    )


def _policy_hash(content: str) -> str:
    """Hash an inline script or style as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
