"""The report's page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from cachekd.atomic import require_place, write_file
from cachekd.cache import Manifest
from cachekd.cache.overview import contents, fidelity, fingerprints, origin
from cachekd.evaluate.scores import MAX_TYPES
from cachekd.losses.terms import TERMS
from cachekd.paths import REPORT_FILE
from cachekd.report.accuracy import difference_text, is_sure, sections, verdict
from cachekd.report.curves import loss_panels, optimizer_panels
from cachekd.report.pages import STYLE, k_plot, page_environment
from cachekd.report.runs import Run, read_run, told_apart
from cachekd.report.settings import settings_of


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
    environment = page_environment()
    environment.globals |= {"difference_text": difference_text, "is_sure": is_sure}
    with matplotlib.rc_context(STYLE):
        plots = {
            "losses": loss_panels(runs),
            "optimizer": optimizer_panels(runs),
            "k": k_plot(run.saved["k_histogram"]) if run.saved["k_histogram"] else None,
        }
    settings, other_settings = settings_of(runs)
    manifest = Manifest.model_validate(run.saved["cache"]) if run.saved["cache"] else None
    return environment.get_template("report.html.jinja").render(
        run=run,
        runs=runs,
        verdict=verdict(runs, found),
        sections=found,
        max_types=MAX_TYPES,
        plots=plots,
        shares=term_shares(run),
        manifest=manifest,
        cache=contents(manifest) | origin(manifest) | fidelity(manifest) if manifest else None,
        fingerprints=fingerprints(manifest) if manifest else None,
        settings=settings,
        other_settings=other_settings,
    )


def term_shares(run: Run) -> dict[str, Any]:
    """Each term's weighted value at the first and the last log entry that has them all, and its share there.

    A term that is orders of magnitude below the others does nothing; this is where it shows.
    """
    config = run.saved["config"]
    names = [name for name in TERMS if any(name in entry for entry in run.steps)]
    weights = {name: config.get(f"lambda_{name}", 1.0) for name in names}  # that of L_CE is no setting
    # Where the switched path runs in some steps only, others lack L_VSD.
    whole = [entry for entry in run.steps if all(name in entry for name in names)]
    ends = [whole[0], whole[-1]] if whole else []
    totals = [sum(weights[name] * entry[name] for name in names) for entry in ends]
    terms = []
    for name in names:
        values = [weights[name] * entry[name] for entry in ends]
        shares = [value / total if total else 0.0 for value, total in zip(values, totals, strict=True)]
        ends_of_term = list(zip(values, shares, strict=True))
        terms.append({"label": TERMS[name].label, "weight": weights[name], "ends": ends_of_term})
    return {"steps": [int(entry["step"]) for entry in ends], "terms": terms}
