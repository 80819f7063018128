"""`cachekd compare`: which variant of a pipeline is better, and how sure that is."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachekd.errors import CachekdError, some_of
from cachekd_cli.console import console, errors, print_result, quiet_libraries, say, table
from cachekd_cli.options import AsJson

if TYPE_CHECKING:
    from cachekd.compare.results import Comparison, Section
    from cachekd.pipeline.vary import Sweep


class Metric(StrEnum):
    """What differences are of: names in `cachekd.compare.results.METRICS`, which takes long to import."""

    exact_match = "exact_match"
    blind = "blind"
    top1_agreement = "top1_agreement"
    kl = "kl"


def compare_command(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline's YAML file, with `vary` or `seeds`.")],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The value of an axis that the others are compared with. Default: the file's `baseline`, or "
            "the first value of its first axis."
        ),
    ] = None,
    metric: Annotated[Metric, typer.Option(help="What differences and curves are of.")] = Metric.exact_match,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for comparison.html, comparison.json and comparison.csv. Default: the pipeline's."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the variants of a pipeline over its seeds: means, paired differences with intervals, cost.

    Example: cachekd compare examples/easy_vqa/ablate.yaml --baseline ce

    Finished runs are compared while others may still run. Missing ones are named.
    """
    from cachekd.pipeline import read_pipeline
    from cachekd.pipeline.vary import expand

    sweep = expand(read_pipeline(pipeline))  # a mistake in the file is said before torch is loaded
    require_variations(sweep)
    quiet_libraries()
    from cachekd.compare import compare, gather, write_comparison
    from cachekd.compare.pages import require_places
    from cachekd.pipeline import look

    folder = sweep.pipeline.out if out is None else out
    require_places(folder)
    states = {state.step.out: state for state in look(sweep.pipeline)}
    gathered = gather(sweep, states)
    comparison = compare(gathered, baseline=baseline, metric=metric.value)
    paths = write_comparison(comparison, gathered, folder)
    print_result(as_json, comparison, partial(print_comparison, paths=paths))


def require_variations(sweep: Sweep) -> None:
    """Refuse a pipeline of single runs.

    Raises:
        CachekdError: it has neither axes nor seeds.
    """
    if not sweep.varies:
        raise CachekdError(
            "there is nothing to compare: nothing varies in this pipeline",
            where=str(sweep.pipeline.out),
            expected="`vary` or `seeds` in the file",
            fix="say what varies (docs/how-to/comparing.md); two runs are compared by `cachekd eval RUN RUN` "
            "and `cachekd report RUN --baseline RUN` makes a page of them",
        )


def print_comparison(comparison: Comparison, paths: list[Path]) -> None:
    """Print tables, a sentence for each difference, and what one has to know of them."""
    from cachekd.compare.words import notes

    for section in comparison.sections:
        print_section(section, comparison)
    if comparison.left_out:
        say("not in these tables:", style="bold")
        reasons: dict[str, list[str]] = {}
        for one in comparison.left_out:
            reasons.setdefault(one.why, []).append(one.point)
        for why, points in reasons.items():
            say(f"  {why}: {some_of(points)}")
    for note in notes(comparison):
        say(note, style="dim")
    for path in paths:
        say(f"written: {path.resolve()}", errors)


def print_section(section: Section, comparison: Comparison) -> None:
    """Print what there is on one set of questions."""
    from cachekd.compare import words

    title = f"{section.step}: {section.questions:,} questions about {section.samples:,} samples of "
    console.print(table(title + section.data, *words.table_of_means(section)))
    console.print(table("exact match by question type", *words.table_of_types(section)))
    for one in section.differences:
        say(words.sentence(one, comparison.unit))
