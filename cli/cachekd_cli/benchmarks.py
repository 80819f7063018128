"""What `cachekd eval --benchmarks` shows: a bar for each model, a table of scores, the paper's figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cachekd.config import EvalConfig
from cachekd.config.evaluate import Suite
from cachekd.paths import shortest
from cachekd_cli.console import console, print_left_out, progress_bar, sample_progress, say, table

if TYPE_CHECKING:
    from cachekd.lmms.scores import BenchmarkScores, ModelScores


def ask_benchmarks(config: EvalConfig) -> BenchmarkScores:
    """Ask behind a progress bar for each model."""
    from cachekd.lmms.run import run_benchmarks
    from cachekd.lmms.scores import require_kept_scores

    require_kept_scores(config.models)
    bars: dict[str, Callable[[int, float], None]] = {}
    with progress_bar("questions") as bar:

        def advance(model: str, total: int, answered: int) -> None:
            if model not in bars:
                bars[model] = sample_progress(bar, model, total)
            bars[model](answered, answered)

        return run_benchmarks(config, advance)


def print_benchmarks(result: BenchmarkScores) -> None:
    """Print every metric of every benchmark, and of a suite what was published."""
    rows = _named(result)
    lines = []
    for one in rows[0][1].benchmarks:
        for metric in one.metrics:
            found = [model.on(one.name) for _, model in rows]
            values = [None if each is None else each.metric(metric.name) for each in found]
            asked = f"{one.questions:,}" + (f" of {one.of:,}" if one.questions < one.of else "")
            texts = ["" if value is None else str(value) for value in values]
            lines.append((one.name, metric.name, asked, *texts))
    columns = ("benchmark", "metric", "questions", *(name for name, _ in rows))
    title = f"public benchmarks, {result.dtype}, lmms-eval {result.versions['lmms-eval']} (± standard error)"
    console.print(table(title, columns, lines, texts=2))
    for name, model in rows:
        for one in model.benchmarks:
            print_left_out(
                f"questions of {one.name} could not be asked of {name}; they count as wrong",
                one.unanswered,
                done="not asked",
            )
    if result.suite is not None:
        print_suite(result.suite, rows, result.limit)


def print_suite(suite: Suite, rows: list[tuple[str, ModelScores]], limit: int | None) -> None:
    """Print the models' percentages beside the published ones, and both averages."""
    from cachekd.lmms.suite import AVERAGES, METHODS, SUITES, average

    lines = [
        (
            line.label,
            line.task,
            *(_points(line.score(model)) for _, model in rows),
            *map(_points, line.published),
        )
        for line in SUITES[suite]
    ]
    ours = [_points(average(suite, model)) for _, model in rows]
    lines.append(("average", "", *ours, *map(_points, AVERAGES[suite])))
    columns = ("paper", "task", *(name for name, _ in rows), *(f"{one} 0.5B" for one in METHODS))
    console.print(table(f"beside the figures of {suite}", columns, lines, texts=2))
    say(
        "The published figures are of other students, trained on other data. VQAv2 and VizWiz are asked here "
        "on their validation sets."
    )
    if limit is not None:
        say(f"Theirs are of all questions, yours of the first {limit:,}.")


def _named(result: BenchmarkScores) -> list[tuple[str, ModelScores]]:
    """Rows by short names: a path by the end that tells it from the others."""
    names = shortest([Path(model.name) for model in result.models])
    models = list(zip(names, result.models, strict=True))
    teacher = "teacher" if result.teacher_quantization is None else "teacher, quantised"
    return [*([] if result.teacher is None else [(teacher, result.teacher)]), *models]


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
