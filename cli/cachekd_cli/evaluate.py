"""`cachekd eval`: how good are these students; `cachekd report`: one page about a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachekd.config import EvalConfig, ReportConfig
from cachekd.paths import shortest
from cachekd_cli.benchmarks import ask_benchmarks, print_benchmarks
from cachekd_cli.console import (
    console,
    print_left_out,
    print_result,
    progress_bar,
    quiet_libraries,
    sample_progress,
    say,
    table,
)
from cachekd_cli.options import AsJson, takes

if TYPE_CHECKING:
    from cachekd.evaluate import Difference, Evaluation, Score
    from cachekd.lmms.scores import BenchmarkScores


_SURE = {True: "yes", False: "not sure"}


@takes(EvalConfig, arguments=["models"])
def eval_command(config: EvalConfig, as_json: AsJson = False) -> None:
    """Exact match per question type, and agreement with the teacher; or scores on public benchmarks.

    Every run folder among the models keeps its scores for `cachekd report`. One model is in memory at a time.

    Example: cachekd eval runs/ce runs/switch-kd --teacher models/llava-7b --data data/test

    Example: cachekd eval runs/ce --data data/test --prior-data data/train --limit 500

    Example: cachekd eval runs/switch-kd --benchmarks pope,gqa,textvqa_val --limit 500
    """
    quiet_libraries()

    def show(result: Evaluation | BenchmarkScores) -> None:
        print_result(as_json, result, print_scores, _for_scripts)

    run_eval(config, show)


def run_eval(
    config: EvalConfig, show: Callable[[Evaluation | BenchmarkScores], None] = lambda result: None
) -> Evaluation | BenchmarkScores:
    """Evaluate; show the scores, save them in the runs and, last, where the settings say."""
    from cachekd.evaluate import Evaluation, only_writer, save_in_runs, save_scores
    from cachekd.lmms.scores import save_in_runs as save_benchmarks_in_runs

    with only_writer(config.out):
        result = ask_benchmarks(config) if config.asks_benchmarks else ask_models(config)
        show(result)
        if isinstance(result, Evaluation):
            save_in_runs(result)
        else:
            save_benchmarks_in_runs(result)
        if config.out is not None:
            save_scores(result, config.out)
    return result


def ask_models(config: EvalConfig) -> Evaluation:
    """Evaluate behind a progress bar for each model."""
    from cachekd.evaluate import require_kept_scores
    from cachekd.evaluate.run import evaluate

    require_kept_scores(config.models)
    bars: dict[str, Callable[[int, int], None]] = {}
    with progress_bar("questions") as bar:

        def advance(model: str, total: int, samples: int, questions: int) -> None:
            if samples == questions == 0:
                bars[model] = sample_progress(bar, model, total)
            bars[model](samples, questions)

        return evaluate(config, advance)


def print_scores(result: Evaluation | BenchmarkScores) -> None:
    """Print the scores of either kind."""
    from cachekd.evaluate import Evaluation

    if isinstance(result, Evaluation):
        print_tables(result)
    else:
        print_benchmarks(result)


def _for_scripts(result: Evaluation | BenchmarkScores) -> Any:
    from cachekd.evaluate import Evaluation

    return result.summary() if isinstance(result, Evaluation) else result


def print_tables(result: Evaluation) -> None:
    """Print tables of totals, of differences and of question types."""
    asked, names = result.asked, short_names(result)
    rows = [(names[name], score) for name, score in result.rows]
    totals = [
        (
            name if s.over_cells is None else f"{name} (over cells)",
            _percent(s.exact_match),
            _percent(s.top1_agreement),
            "" if s.kl is None else f"{s.kl:.4f}",
        )
        for name, s in rows
    ]
    title = f"{asked.questions:,} questions about {len(asked.per_sample):,} samples of {asked.data}"
    console.print(table(title, ("model", "exact match", "agrees with teacher", "KL (nats)"), totals))
    print_cells(rows)
    print_differences(result, names)
    print_types(result, rows)
    if asked.unasked_answers:
        say(f"{asked.unasked_answers:,} answers follow no question, and were not asked for")
    if result.prior_left_out:
        say(f"prior: {result.prior_left_out:,} records have no answer to a question")
    print_left_out("samples that cannot be used, or are too long", asked.left_out)


def print_cells(rows: list[tuple[str, Score]]) -> None:
    """Say of which rows agreement and KL are over cells, and at how many answer tokens."""
    for name, score in rows:
        if (cells := score.over_cells) is None:
            continue
        say(
            f"{name}: agreement and KL are {cells}, as it writes them in other tokens than the teacher; they "
            "are not to be compared with those of another tokenizer"
        )
        if cells.differing:
            first = next(iter(cells.first.items()))
            say(
                f"{name}: {cells.differing:,} answers have other bytes than the teacher's, and are in exact "
                f"match alone; the first is {first[0]}: {first[1]}"
            )


def short_names(result: Evaluation) -> dict[str, str]:
    """Name rows for tables: a path by the end that tells it from the others."""
    models = [score.name for score in result.models]
    short = dict(zip(models, shortest(list(map(Path, models))), strict=True))
    short |= {f"{name}, blind": f"{own}, blind" for name, own in short.items()}
    teacher = "teacher" if result.teacher_quantization is None else "teacher, quantised"
    return {
        name: teacher if name.startswith("teacher ") else short.get(name, name) for name, _ in result.rows
    }


def print_differences(result: Evaluation, names: dict[str, str]) -> None:
    """Print the differences between rows, in points, and how sure they are."""
    rows = [
        (names[d.row], names[d.against], f"{100 * d.difference:+.2f}", _interval(d), _SURE[d.sure])
        for d in result.differences
    ]
    if rows:
        columns = ("model", "against", "points", "95 % interval", "beyond chance")
        console.print(table("difference in exact match, same questions", columns, rows))


def print_types(result: Evaluation, rows: list[tuple[str, Score]]) -> None:
    """Print exact match by question type, for the most frequent types."""
    from cachekd.evaluate.scores import MAX_TYPES

    kinds = list(rows[0][1].by_type)[:MAX_TYPES]
    counted = [
        (kind, f"{result.asked.types[kind]:,}", *(f"{100 * score.by_type[kind]:.1f}" for _, score in rows))
        for kind in kinds
    ]
    columns = ("question", "count", *(name for name, _ in rows))
    console.print(table("exact match by question type, %", columns, counted))


def _interval(difference: Difference) -> str:
    low, high = difference.low, difference.high
    return "too few samples" if low is None or high is None else f"{100 * low:+.2f} to {100 * high:+.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


@takes(ReportConfig, arguments=["run"], named={"baselines": "--baseline"})
def report_command(config: ReportConfig) -> None:
    """Write one self-contained HTML page: accuracies, loss curves by term, cache, configuration.

    Example: cachekd report runs/switch-kd --baseline runs/ce
    """
    print_page(run_report(config))


def run_report(config: ReportConfig) -> Path:
    """Write the page; return where it is."""
    from cachekd.report import write_report

    return write_report(config.run, config.baselines, config.out)


def print_page(page: Path) -> None:
    """Say where a report is."""
    say(f"report: {page.resolve()}")
