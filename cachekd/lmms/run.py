"""From the settings of `cachekd eval` to scores on public benchmarks.

The order is that of what may fail: the environment, the tasks, their data; then one model after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import get_token

from cachekd.cache.quantization import QuantizationInfo
from cachekd.config import EvalConfig
from cachekd.data.batches import limits_said
from cachekd.errors import CachekdError
from cachekd.evaluate.inputs import load_settings_of, open_models
from cachekd.lmms.environment import require_lmms_eval, versions
from cachekd.lmms.harness import Asked, LoadedTask, ask, load_task
from cachekd.lmms.obstacles import require_scorable
from cachekd.lmms.scores import BenchmarkScores, ModelScores
from cachekd.lmms.suite import tasks_of
from cachekd.lmms.task_files import TaskFile, TaskFiles
from cachekd.models import default_device, dtype_of
from cachekd.models.device import free_memory

OWN_TASKS = Path(__file__).parent / "tasks"

Progress = Callable[[str, int, int], None]
"""The model that is asked; the questions in all; those that were answered since the last call."""
Log = Callable[[str, Sequence[Asked]], None]
"""The model, and what came of each benchmark, question by question."""


def run_benchmarks(
    config: EvalConfig,
    progress: Progress = lambda model, total, answered: None,
    log: Log = lambda model, asked: None,
) -> BenchmarkScores:
    """Ask models public benchmarks, each with its own prompts and metrics.

    Raises:
        CachekdError: lmms-eval is not here; a benchmark is unknown, cannot be scored here, or has no data; a
            model cannot be loaded, or a question cannot be asked.
    """
    tasks = open_benchmarks(config)
    device = default_device()
    dtype = dtype_of(config.dtype, device)
    files = open_models(config)
    for one in files.values():
        _ = one.encoder  # what a folder lacks is known before the first model is loaded
    quantised: QuantizationInfo | None = None
    if config.teacher is not None:
        quantised = files[config.teacher].quantization(config.quantization, dtype)
    total = sum(min(one.questions, config.limit or one.questions) for one in tasks)

    def scores(path: str, *, as_teacher: bool = False) -> ModelScores:
        from cachekd.lmms.answer import Answerer

        free_memory()  # of the model before
        model = files[path].load(
            dtype=dtype, device=device, **load_settings_of(config, as_teacher=as_teacher)
        )
        limits = limits_said(config.batch_size, config.batch_tokens)
        progress(path, total, 0)
        asked = ask(
            Answerer(model, files[path], limits),
            tasks,
            limit=config.limit,
            on_error=config.on_error,
            progress=lambda answered: progress(path, total, answered),
        )
        log(path, asked)
        return ModelScores(name=path, benchmarks=[one.scores for one in asked])

    return BenchmarkScores(
        at=datetime.now(UTC).isoformat(),
        dtype=str(dtype).removeprefix("torch."),
        limit=config.limit,
        suite=config.suite,
        versions=versions(),
        teacher=None if config.teacher is None else scores(config.teacher, as_teacher=True),
        teacher_quantization=quantised,
        models=[scores(path) for path in config.models],
    )


def require_benchmarks(config: EvalConfig) -> list[TaskFile]:
    """The tasks that are asked for. No data are looked at.

    Raises:
        CachekdError: lmms-eval is not here, a task is unknown, or cannot be scored here.
    """
    folders = [OWN_TASKS, require_lmms_eval()]
    if config.tasks_dir is not None:
        if not config.tasks_dir.is_dir():
            raise CachekdError(
                "there is no such folder of tasks", where=str(config.tasks_dir), fix="look at --tasks-dir"
            )
        folders.insert(0, config.tasks_dir)
    files = TaskFiles(folders)
    tasks = files.tasks(dict.fromkeys([*config.benchmarks, *tasks_of(config.suite)]))
    names = [one.name for one in tasks]
    if unknown := sorted(config.folders.keys() - set(names)):
        raise CachekdError(
            "there are data for a benchmark that is not asked",
            where="setting 'benchmark_data'",
            expected=", ".join(names),
            found=unknown[0],
            fix=f"--benchmarks {','.join([*config.benchmarks, unknown[0]])}",
        )
    for name, folder in config.folders.items():
        if not Path(folder).is_dir():
            raise CachekdError(
                "there is no such folder", where=f"--benchmark-data {name}={folder}", fix="look at its path"
            )
    require_scorable(tasks, logged_in=get_token() is not None, own_data=config.folders)
    return tasks


def open_benchmarks(config: EvalConfig) -> list[LoadedTask]:
    """The tasks with their data: what is missing is known before a model is loaded.

    Raises:
        CachekdError: as `require_benchmarks`; or the data of one cannot be had.
    """
    tasks = require_benchmarks(config)
    folders = {name: Path(folder) for name, folder in config.folders.items()}
    return [load_task(one, folders.get(one.name)) for one in tasks]
