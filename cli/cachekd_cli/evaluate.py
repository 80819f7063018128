"""`cachekd eval`: exact match and agreement with the teacher."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachekd.files import EVAL_FILE, RUN_FILE
from cachekd.paths import PathOrName
from cachekd_cli.console import (
    console,
    print_json,
    print_left_out,
    progress_bar,
    quiet_libraries,
    sample_progress,
    table,
)
from cachekd_cli.data_options import Given, read_data, takes_data

if TYPE_CHECKING:
    from cachekd.data_options import Data
    from cachekd.evaluate import Evaluation


@takes_data()
def eval_command(
    models: Annotated[
        list[PathOrName], typer.Argument(help="Model or run folders; all are asked the same questions.")
    ],
    data: Given,
    teacher: Annotated[
        PathOrName | None, typer.Option(help="Adds its own row, and every model's agreement with it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions per forward.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Exact match per question type, and agreement with the teacher.

    Every run folder among the models keeps its result for `cachekd report`.

    Example: cachekd eval runs/ce runs/switch-kd --teacher models/llava-7b --data data/test
    """
    options = read_data(data)
    quiet_libraries()
    result = run_eval(models, options, teacher, batch_size)
    save_in_runs(result)
    if as_json:
        print_json(asdict(result))
    else:
        print_tables(result)


def run_eval(models: list[str], data: Data, teacher: str | None, batch_size: int = 128) -> Evaluation:
    """Evaluate behind a progress bar."""
    from cachekd.evaluate import evaluate
    from cachekd.samples import open_samples

    total = len(open_samples(data))
    with progress_bar("questions") as bar:
        advance = sample_progress(bar, "eval", total)
        return evaluate(models, data, teacher=teacher, batch_size=batch_size, progress=advance)


def save_in_runs(result: Evaluation) -> None:
    """Leave each run its score beside the teacher's."""
    for score in result.models:
        if (Path(score.path) / RUN_FILE).exists():
            kept = {**asdict(result), "models": [asdict(score)]}
            (Path(score.path) / EVAL_FILE).write_text(json.dumps(kept, indent=1))


def print_tables(result: Evaluation) -> None:
    """One table of totals, one of question types."""
    scores = [*([result.teacher] if result.teacher else []), *result.models]
    names = [("teacher " if score is result.teacher else "") + score.path for score in scores]
    percent = lambda share: "" if share is None else f"{100 * share:.2f} %"  # noqa: E731
    totals = [
        (name, percent(s.exact_match), percent(s.top1_agreement), "" if s.kl is None else f"{s.kl:.4f}")
        for name, s in zip(names, scores, strict=True)
    ]
    title = f"{result.questions:,} questions of {result.data}"
    console.print(table(title, ("model", "exact match", "agrees with teacher", "KL (nats)"), totals))
    rows = [
        (kind, f"{result.types[kind]:,}", *(percent(score.by_type[kind]) for score in scores))
        for kind in scores[0].by_type
    ]
    console.print(table("exact match by question type", ("question", "count", *names), rows))
    print_left_out("samples that cannot be used, or are too long", result.left_out)
