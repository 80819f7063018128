"""A comparison as files: a page, JSON, and a table that pandas reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cachekd.atomic import require_place, write_file
from cachekd.compare import words
from cachekd.compare.plots import panels
from cachekd.compare.points import Gathered
from cachekd.compare.results import COSTS, METRICS, Comparison, Section
from cachekd.report.pages import page_environment

FILES = ("comparison.html", "comparison.json", "comparison.csv")


def require_places(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before anything is read.

    Raises:
        CachekdError: it cannot.
    """
    for name in FILES:
        require_place(folder / name)


def write_comparison(comparison: Comparison, gathered: Gathered, folder: Path) -> list[Path]:
    """Write `comparison.html`, `.json` and `.csv`; returns where they are.

    Raises:
        CachekdError: they cannot be written.
    """
    contents = (page(comparison), comparison.model_dump_json(indent=1), csv_table(gathered))
    for name, content in zip(FILES, contents, strict=True):
        write_file(folder / name, content.encode())
    return [folder / name for name in FILES]


def csv_table(gathered: Gathered) -> str:
    """A row for every point and set of questions: axes, seed, scores, cost, and a column for each question
    type. Shares are from 0 to 1, `kl` is in nats; `over_cells` are the answer tokens that both of the teacher
    are means over, where they are over cells. What is not known is empty."""
    rows = list(_rows(gathered))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _rows(gathered: Gathered) -> Iterator[dict[str, Any]]:
    for point in gathered.points:
        for step, evaluation in point.evaluations.items():
            [score] = evaluation.models
            rows = {"teacher": evaluation.teacher, "prior": evaluation.prior, "blind": score.blind}
            cost = {} if point.cost is None else point.cost.model_dump()
            yield {
                **{axis: point.variant[axis] for axis in gathered.axes},
                "seed": point.seed,
                "eval": step,
                "questions": evaluation.asked.questions,
                "fingerprint": evaluation.asked.fingerprint,
                **{name: getattr(score, name) for name in METRICS if name != "blind"},
                **({} if score.over_cells is None else {"over_cells": score.over_cells.compared}),
                **{name: None if row is None else row.exact_match for name, row in rows.items()},
                **{name: cost.get(name) for name in (*COSTS, "tokens")},
                "run": str(point.run),
                **{f"exact_match: {kind}": share for kind, share in score.by_type.items()},
            }


def page(comparison: Comparison) -> str:
    """The page's HTML."""
    template = page_environment().get_template("compare.html.jinja")
    return template.render(
        comparison=comparison,
        sections=[_shown(section, comparison) for section in comparison.sections],
        words=words,
        metrics=METRICS,
        notes=words.notes(comparison),
    )


def _shown(section: Section, comparison: Comparison) -> dict[str, Any]:
    """A section with what the template needs of it."""
    kinds = words.shown_types(section)
    return {
        "section": section,
        "sentences": [words.sentence(one, comparison.unit) for one in section.differences],
        "tables": {"means": words.table_of_means(section), "types": words.table_of_types(section)},
        "plots": panels(section, comparison),
        "rarer": len(section.types) - len(kinds),
        "by_type": [one for one in section.by_type if one.type in kinds],
    }
