"""Scores on public benchmarks, as runs keep them: one table, a column for each run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cachekd.lmms.scores import BenchmarkScores
from cachekd.report.runs import Run


@dataclass(frozen=True)
class BenchmarkLine:
    """A metric of a benchmark.

    Attributes:
        benchmark: by lmms-eval's name.
        metric: likewise.
        questions: how many were asked, and of how many if these were not all.
        values: of each run, and of the teacher if a run has its score; "" where there is none.
    """

    benchmark: str
    metric: str
    questions: str
    values: list[str]


@dataclass(frozen=True)
class BenchmarkTable:
    """All lines.

    Attributes:
        columns: names of rows, the runs' first.
        notes: what a reader has to know of it, in sentences.
    """

    columns: list[str]
    lines: list[BenchmarkLine]
    notes: list[str]


def benchmark_table(runs: Sequence[Run]) -> BenchmarkTable | None:
    """Put the benchmarks of the first run beside what the others and its teacher scored on them; None if it
    was asked none. The first questions of a benchmark are another line than all of them."""
    if not runs[0].benchmarks:
        return None
    teacher = any(one.teacher is not None for one in runs[0].benchmarks)
    lines = [line for own in runs[0].benchmarks for line in _lines(own, runs, teacher=teacher)]
    columns = [run.name for run in runs] + ["teacher"] * teacher
    return BenchmarkTable(columns, lines, list(_notes(runs)))


def _lines(own: BenchmarkScores, runs: Sequence[Run], *, teacher: bool) -> Iterator[BenchmarkLine]:
    [benchmark] = own.models[0].benchmarks
    others = [_same(own, run) for run in runs]
    found = [None if other is None else other.models[0].benchmarks[0] for other in others]
    if teacher:
        found.append(None if own.teacher is None else own.teacher.on(benchmark.name))
    asked = f"{benchmark.questions:,}"
    if benchmark.questions < benchmark.of:
        asked += f", the first of {benchmark.of:,}"
    for metric in benchmark.metrics:
        metrics = [None if one is None else one.metric(metric.name) for one in found]
        yield BenchmarkLine(
            benchmark.name, metric.name, asked, ["" if one is None else str(one) for one in metrics]
        )


def _same(own: BenchmarkScores, run: Run) -> BenchmarkScores | None:
    """What a run scored on as many questions of the same benchmark."""
    name = own.models[0].benchmarks[0].name
    return next((one for one in run.benchmarks if one.models[0].on(name) and one.limit == own.limit), None)


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    yield (
        "Behind ±: the standard error, of metrics that are means over the questions. Metrics are named and "
        "scaled by lmms-eval, which also writes the prompts: a student that never saw such a prompt may "
        "answer otherwise than it was taught."
    )
    scored = [(run, one) for run in runs for one in run.benchmarks]
    for what, said in {
        "dtype": {one.dtype for _, one in scored},
        "lmms-eval": {one.versions.get("lmms-eval", "") for _, one in scored},
        "transformers": {one.versions.get("transformers", "") for _, one in scored},
    }.items():
        alike = len(said) == 1
        yield f"{what}: {', '.join(sorted(said))}" + (
            "." if alike else ": scores of different ones are mixed."
        )
    for run, one in scored:
        [benchmark] = one.models[0].benchmarks
        if benchmark.unanswered.samples:
            yield (
                f"{benchmark.unanswered.samples:,} questions of {benchmark.name} could not be asked of "
                f"{run.name}; they count as wrong."
            )
