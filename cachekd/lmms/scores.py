"""Scores on public benchmarks, and where runs keep them. Neither models nor lmms-eval are needed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, ValidationError

from cachekd.atomic import require_place, write_file
from cachekd.cache.quantization import QuantizationInfo
from cachekd.config.evaluate import Suite
from cachekd.data.left_out import LeftOutSamples
from cachekd.errors import CachekdError, first_line
from cachekd.lock import alone
from cachekd.paths import BENCHMARKS_FOLDER, EVALUATIONS_FOLDER, RUN_FILE

_PATIENCE = 60.0  # seconds; another evaluation saves its own within a moment


class _Model(BaseModel):
    # A metric may be none: NaN is written as such, not as null, which could not be read again.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Metric(_Model):
    """One number of a benchmark, as lmms-eval names and scales it.

    Attributes:
        name: of the metric; behind a comma lmms-eval's filter, if it is not the usual one.
        value: some are shares, some are percentages, MME's are sums of points. NaN where there is none, such
            as a mean over questions that are not among the first ones.
        stderr: the standard error of `value` where that is a mean over the questions; None of any other.
        higher_is_better: None where the benchmark does not say it.
    """

    name: str
    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None

    def __str__(self) -> str:
        return f"{self.value:,.4g}" + ("" if self.stderr is None else f" ± {self.stderr:.2g}")


class Benchmark(_Model):
    """One model's scores on one benchmark.

    Attributes:
        name: of lmms-eval's task.
        version: that the task's file states.
        data: where its data are: a name on the hub, or a folder.
        questions: how many were asked.
        of: how many it has.
        metrics: in lmms-eval's order.
        unanswered: questions that the model could not be asked. They have the empty answer, and count.
    """

    name: str
    version: str
    data: str
    questions: int
    of: int
    metrics: list[Metric]
    unanswered: LeftOutSamples

    def metric(self, name: str) -> Metric | None:
        """Find a metric; None if there is none of this name."""
        return next((one for one in self.metrics if one.name == name), None)


class ModelScores(_Model):
    """One model.

    Attributes:
        name: its path.
        benchmarks: in the order in which they were asked for.
    """

    name: str
    benchmarks: list[Benchmark]

    def on(self, benchmark: str) -> Benchmark | None:
        """Find the scores on a benchmark; None if it was not asked."""
        return next((one for one in self.benchmarks if one.name == benchmark), None)


class BenchmarkScores(_Model):
    """Models on the same benchmarks.

    Attributes:
        at: when they were asked, in UTC.
        dtype: that the models ran in.
        limit: only so many questions of each benchmark were asked; None: all.
        suite: that was asked for; None where a run keeps a benchmark by itself.
        versions: of lmms-eval, cachekd, torch and transformers.
        teacher: its row, if it was asked too.
        teacher_quantization: how its weights were quantised; None: they were not.
        models: a row each.
    """

    at: str
    dtype: str
    limit: int | None = None
    suite: Suite | None = None
    versions: dict[str, str]
    teacher: ModelScores | None = None
    teacher_quantization: QuantizationInfo | None = None
    models: list[ModelScores]

    @property
    def rows(self) -> Iterator[tuple[str, ModelScores]]:
        """Every row with its name, the teacher's first."""
        if self.teacher is not None:
            yield f"teacher {self.teacher.name}", self.teacher
        for model in self.models:
            yield model.name, model

    def of(self, model: ModelScores, benchmark: str) -> BenchmarkScores:
        """The same of one model and one benchmark, with the teacher's row of that."""
        teacher = None if self.teacher is None else _only(self.teacher, benchmark)
        alone = {"models": [_only(model, benchmark)], "teacher": teacher, "suite": None}
        return self.model_copy(update=alone)


def _only(row: ModelScores, benchmark: str) -> ModelScores:
    return ModelScores(name=row.name, benchmarks=[one for one in row.benchmarks if one.name == benchmark])


def save_in_runs(result: BenchmarkScores) -> None:
    """Leave each run among the models its own scores, a file for each benchmark.

    The first questions of a benchmark are another file than all of them, so that a trial takes nothing away.

    Raises:
        CachekdError: a file cannot be written.
    """
    for model in result.models:
        if not (Path(model.name) / RUN_FILE).exists():
            continue
        for one in model.benchmarks:
            path = benchmark_path(Path(model.name), one.name, result.limit)
            own = result.of(model, one.name)
            with alone(path.parent, "saves scores in", patience=_PATIENCE):
                write_file(path, own.model_dump_json(indent=1).encode())


def require_kept_scores(models: Sequence[str]) -> None:
    """Refuse at once what could not be kept, not after hours.

    Raises:
        CachekdError: a run among the models holds scores that cannot be read, or cannot be written to.
    """
    for path in map(Path, models):
        if (path / RUN_FILE).exists():
            require_place(benchmark_path(path, "any", None))
            read_benchmarks(path)


def benchmark_path(run: Path, benchmark: str, limit: int | None) -> Path:
    """Where a run keeps its scores on a benchmark, or on the first questions of it.

    A task of one's own may have any name: a slash in it is no folder.
    """
    name = quote(benchmark, safe=" ") + ("" if limit is None else f"-first-{limit}")
    return run / EVALUATIONS_FOLDER / BENCHMARKS_FOLDER / f"{name}.json"


def read_benchmarks(run: Path) -> list[BenchmarkScores]:
    """All benchmarks that a run keeps scores on, by name: each has one model, the run, and one benchmark.

    Raises:
        CachekdError: one of the files cannot be read.
    """
    paths = sorted((run / EVALUATIONS_FOLDER / BENCHMARKS_FOLDER).glob("*.json"))
    return [_read(path) for path in paths]


def _read(path: Path) -> BenchmarkScores:
    try:
        found = BenchmarkScores.model_validate_json(path.read_bytes())
        [model] = found.models
        [_] = model.benchmarks
    except (OSError, ValidationError, ValueError) as error:
        raise CachekdError(
            "the scores of a run cannot be read",
            where=str(path),
            found=first_line(error),
            fix="remove the file, and run `cachekd eval --benchmarks` again",
        ) from None
    return found
