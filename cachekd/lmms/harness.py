"""What is asked of lmms-eval itself: a task with its data, and an evaluation. It is imported here alone and
in `adapter`, when one of these is needed: that takes seconds."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from cachekd.config.data import OnError
from cachekd.data.left_out import LeftOutSamples
from cachekd.errors import BadSample, CachekdError, first_line
from cachekd.lmms.answer import Answerer
from cachekd.lmms.obstacles import fetches_in_code
from cachekd.lmms.scores import Benchmark, Metric
from cachekd.lmms.task_files import TaskFile
from cachekd.paths import DATASET_DICT

_USUAL_FILTER = "none"


@dataclass(frozen=True)
class LoadedTask:
    """A benchmark with its data.

    Attributes:
        file: its YAML.
        data: where its data are.
        task: lmms-eval's object.
    """

    file: TaskFile
    data: str
    task: Any

    @property
    def name(self) -> str:
        """As lmms-eval knows it."""
        return self.file.name

    @property
    def questions(self) -> int:
        """How many it has."""
        return len(self.task.eval_docs)


def load_task(file: TaskFile, folder: Path | None) -> LoadedTask:
    """Open a benchmark and its data, and ask it for its first question, as a model is asked.

    Args:
        folder: with its data; None: they are where the task's file says, mostly on the hub.

    Raises:
        CachekdError: the data cannot be had, or the question is not about pictures and texts.
    """
    with _quiet():
        from lmms_eval.api.task import ConfigurableMessagesTask
        from lmms_eval.utils import load_yaml_config

        from cachekd.lmms.adapter import question

        name = str(folder or file.config.get("dataset_path"))
        try:
            config = load_yaml_config(str(file.path), mode="full")
            # `token: true` asks for a login before anything is fetched, of public data too. Without it the
            # hub's own login is used where there is one, and only data that need it are refused.
            config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {})}
            config["dataset_kwargs"].pop("token", None)
            if folder is not None:
                config |= _from_folder(folder, file)
            task = ConfigurableMessagesTask(config=config)
            first = task.doc_to_messages(task.eval_docs[0])
        except Exception as error:  # datasets', the hub's, the task's own: each has its own
            raise _no_data(file, name, folder, error) from None
        try:
            question(first, f"{file.name}/0")
        except BadSample as error:
            raise CachekdError(
                "the benchmark cannot be asked",
                where=f"benchmark {file.name!r}",
                found=f"{error.problem}: {error.found}",
                fix="leave it out",
            ) from None
    return LoadedTask(file, name, task)


def _from_folder(folder: Path, file: TaskFile) -> dict[str, Any]:
    """The settings of a task whose data are in a folder that `datasets` wrote, or of its data files."""
    whole = (folder / DATASET_DICT).is_file()
    changed: dict[str, Any] = {
        "dataset_path": str(folder.absolute()),
        "dataset_name": None,
        "dataset_kwargs": {"load_from_disk": True} if whole else {},
    }
    # GQA's fetches pictures from the hub: a folder has them beside the questions.
    return changed | ({"process_docs": None} if fetches_in_code(file) else {})


def _no_data(file: TaskFile, name: str, folder: Path | None, error: Exception) -> CachekdError:
    cause = _cause(error)
    split = file.config.get("test_split") or file.config.get("validation_split")
    return CachekdError(
        "the data of a benchmark cannot be opened",
        where=f"benchmark {file.name!r}, {name}",
        expected=f"a folder of `datasets` with the split {split!r}" if folder else "data that can be fetched",
        found=f"{type(cause).__name__}: {first_line(cause)}",
        fix="write it with `datasets`: DatasetDict({...}).save_to_disk(FOLDER), or Parquet files in it"
        if folder
        else f"with a network: look whether {name} can be reached, and `hf auth login` if it asks for one; "
        f"without: --benchmark-data {file.name}=FOLDER",
    )


def _cause(error: BaseException) -> BaseException:
    """What went wrong, where tenacity says only that it tried several times."""
    attempt = getattr(error, "last_attempt", None)
    cause = None if attempt is None else attempt.exception()
    return error if cause is None else _cause(cause)


@dataclass(frozen=True)
class Asked:
    """What came of a benchmark.

    Attributes:
        scores: its metrics.
        samples: of each question what lmms-eval logs: `doc_id`, `target`, `filtered_resps`, its metrics.
    """

    scores: Benchmark
    samples: list[dict[str, Any]]


def ask(
    answerer: Answerer,
    tasks: Sequence[LoadedTask],
    *,
    limit: int | None,
    on_error: OnError,
    progress: Callable[[int], None],
) -> list[Asked]:
    """Ask one model benchmarks, and score its answers.

    Args:
        limit: of each benchmark, only the first so many questions.
        on_error: see `Chat.of`.
        progress: is told how many questions were answered since the last time.

    Raises:
        CachekdError: a question cannot be asked, where these stop; memory ran out; or a benchmark cannot be
            scored.
    """
    with _quiet(), TemporaryDirectory() as folder:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        from cachekd.lmms.adapter import Chat

        chat = Chat.of(answerer, on_error, progress)
        for one in tasks:
            one.task._instances = None  # those of the model before
        try:
            found = simple_evaluate(
                model=chat,
                tasks=[one.task for one in tasks],
                task_manager=TaskManager("ERROR", include_defaults=False),
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                verbosity="ERROR",
                # Files for servers go there, and pictures are not read once more to score a text.
                cli_args=SimpleNamespace(output_path=folder, process_with_media=False, reasoning_tags=None),
            )
        except CachekdError:
            raise
        except Exception as error:
            cause = _cause(error)
            raise CachekdError(
                "lmms-eval cannot score the benchmarks",
                where=", ".join(one.name for one in tasks),
                found=f"{type(cause).__name__}: {first_line(cause)}",
                fix="ask them one at a time to see which it is, and leave it out",
            ) from error
    return [_asked(one, found, chat.unanswered) for one in tasks]


def _asked(one: LoadedTask, found: Mapping[str, Any], unanswered: Mapping[str, str]) -> Asked:
    samples = found["samples"][one.name]
    better = one.task.higher_is_better()
    own = {name: why for name, why in unanswered.items() if name.startswith(f"{one.name}/")}
    scores = Benchmark(
        name=one.name,
        version=_version(one.file.config.get("metadata")),
        data=one.data,
        questions=len({sample["doc_id"] for sample in samples}),
        of=one.questions,
        metrics=list(_metrics(found["results"][one.name], samples, better)),
        unanswered=LeftOutSamples.of(own),
    )
    return Asked(scores, samples)


def _metrics(
    values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], better: Mapping[str, bool]
) -> Iterator[Metric]:
    """The metrics that are numbers: others are files for a server."""
    for key, value in values.items():
        name, comma, how = key.partition(",")
        if not comma or "_stderr" in name or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        yield Metric(
            name=name if how == _USUAL_FILTER else key,
            value=float(value),
            stderr=standard_error([sample.get(name) for sample in samples], float(value)),
            higher_is_better=better.get(name),
        )


def standard_error(scores: Sequence[Any], mean: float) -> float | None:
    """The standard error of a metric that is the mean of its questions' scores; None of any other metric.

    Args:
        scores: of each question: a number, or a mapping with one under "score", as lmms-eval's tasks have it.
        mean: the metric.
    """
    numbers = [score.get("score") if isinstance(score, Mapping) else score for score in scores]
    if len(numbers) < 2 or not all(isinstance(number, int | float) for number in numbers):
        return None
    values = [float(number) for number in numbers]  # type: ignore[arg-type]
    if not math.isclose(fmean(values), mean, rel_tol=1e-6, abs_tol=1e-9):
        return None
    return stdev(values) / math.sqrt(len(values))


def _version(metadata: Any) -> str:
    """What a task's file states, as a mapping or as a list of such."""
    parts = metadata if isinstance(metadata, list) else [metadata]
    return next((str(part["version"]) for part in parts if isinstance(part, dict) and "version" in part), "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lmms-eval's words off stdout, which is ours, and its progress bars off the screen."""
    with redirect_stdout(io.StringIO()):
        import lmms_eval.api.task
        import lmms_eval.evaluator
        from loguru import logger
        from tqdm import tqdm

        def silent(*args: Any, **options: Any) -> Any:
            return tqdm(*args, **options | {"disable": True})

        logger.remove()
        logger.add(sys.stderr, level="ERROR", format="lmms-eval: {message}")
        lmms_eval.evaluator.tqdm = lmms_eval.api.task.tqdm = silent
        yield
