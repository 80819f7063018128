"""A pipeline's steps with everything said: whole settings, folders, and which step takes what from which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from cachekd.config import Config, DataOptions, DumpConfig, EvalConfig, ReportConfig, TrainConfig, refusal
from cachekd.config.base import Mistake, defaults_of
from cachekd.config.data import WHICH_SAMPLES
from cachekd.config.evaluate import OF_OWN_DATA
from cachekd.config.train import STAGES
from cachekd.errors import CachekdError, about
from cachekd.paths import DATASET_DICT, MANIFEST_FILE, REPORT_FILE, RUN_FILE, SCORES_FILE
from cachekd.pipeline.config import PipelineConfig
from cachekd.pipeline.steps import Defaults


class Kind(NamedTuple):
    """A kind of step.

    Attributes:
        config: its settings.
        shared: those that it has from `defaults`, beside those of data.
        last_file: that it writes; where it is, the step is finished.
    """

    config: type[Config]
    shared: tuple[str, ...]
    last_file: str


KINDS = {
    "dump": Kind(DumpConfig, ("teacher", "dtype", "workers"), MANIFEST_FILE),
    "train": Kind(TrainConfig, ("teacher", "student", "dtype", "workers"), RUN_FILE),
    "eval": Kind(EvalConfig, ("teacher",), SCORES_FILE),
    "report": Kind(ReportConfig, (), REPORT_FILE),
}
_RUNS, _MODELS, _CACHES = ("run", "baselines"), ("student", "models"), ("cache", "eval_cache")
_TAKES = {"train": (*_RUNS, *_MODELS), "dump": _CACHES}  # settings that may name a step above, of that kind
_OF_DATA = set(DataOptions.model_fields)


@dataclass(frozen=True)
class PlannedStep:
    """One step.

    Attributes:
        name: its own.
        kind: dump, train, eval or report.
        config: of that kind, whole.
        upstream: steps whose output it takes.
        models: model folders or hub names that it reads and no step makes.
        data: that it reads, by the setting that names them.
        files: others that it reads and no step makes: a cache's manifest, a binding, tasks and their data.
        continues: the train step above whose student this one goes on with.
        group: the label of the group that does it, where the pipeline varies.
    """

    name: str
    kind: str
    config: Any
    upstream: tuple[str, ...]
    models: tuple[str, ...]
    data: dict[str, DataOptions]
    files: tuple[Path, ...]
    continues: str | None = None
    group: str = ""

    @property
    def what(self) -> str:
        """What it is, for a message that names it."""
        return f"{self.group}: step" if self.group else "step"

    @property
    def out(self) -> Path:
        """Its folder."""
        return self.config.out.parent if self.kind == "report" else self.config.out

    @property
    def finished(self) -> bool:
        """Whether the file is there that is written last. Whether all are: `damage_of`."""
        return (self.out / KINDS[self.kind].last_file).exists()


def plan_steps(
    pipeline: PipelineConfig, folders: Mapping[str, Path] | None = None, *, without_idle: bool = False
) -> list[PlannedStep]:
    """Every step with its whole settings, checked before any of them runs.

    Args:
        folders: where each step's folder stands; by default the pipeline's `out`. What varies in it is not
            looked at: `cachekd.pipeline.vary`.
        without_idle: settings that no term of a train step asks for are at their defaults, so that values of
            an axis that differ in them alone are one student.

    Raises:
        CachekdError: settings are missing, or do not go with others; their steps are named.
    """
    above = _Above(pipeline, folders, without_idle=without_idle)
    steps: list[PlannedStep] = []
    mistakes: list[Mistake] = []
    for step in pipeline.steps:
        kind = KINDS[step.step]
        try:
            with about(step.name, what="step"):
                values = _values(step.step, _said(step, kind.config), above)
                out = above.folders[step.name]
                out = out / REPORT_FILE if step.step == "report" else out
                config = kind.config(**values | {"out": out})
                steps.append(_planned(step.name, step.step, config, above))
        except ValidationError as error:  # what `read_pipeline` did not see: missing, or not with others
            mistakes += [Mistake.of(each, f"step {step.name!r}", kind.config) for each in error.errors()]
        except CachekdError:
            if not mistakes:
                raise
        above.names[step.step].append(step.name)
    if mistakes:
        raise refusal(mistakes, "say it in the step, or in `defaults`")
    return steps


def settings_said(pipeline: PipelineConfig) -> dict[str, dict[str, Any]]:
    """The settings of each step that the file says, there or in `defaults`, before they are checked."""
    above = _Above(pipeline)
    found = {}
    for step in pipeline.steps:
        found[step.name] = _values(step.step, _said(step, KINDS[step.step].config), above)
        above.names[step.step].append(step.name)
    return found


class _Above:
    """What the steps so far, by kind, and the file's defaults offer to the next."""

    def __init__(
        self,
        pipeline: PipelineConfig,
        folders: Mapping[str, Path] | None = None,
        *,
        without_idle: bool = False,
    ) -> None:
        self.without_idle = without_idle
        where = dict(folders or {})
        self.folders = {step.name: where.get(step.name, pipeline.out) / step.name for step in pipeline.steps}
        self.defaults = _said(pipeline.defaults, Defaults)
        self.names: dict[str, list[str]] = {kind: [] for kind in KINDS}

    def shared(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self.defaults[name] for name in names if self.defaults.get(name) is not None}

    def folder(self, value: Any, kind: str) -> Any:
        """Find the folder of the step, or of each, that is named; another value is a path or a hub's name."""
        if isinstance(value, list):
            return [self.folder(each, kind) for each in value]
        return str(self.folders[value]) if value in self.names[kind] else value


def _said(model: Config, config: type[Config]) -> dict[str, Any]:
    """The settings that the file has. A null is one, and turns a preset off; but not where `config` needs a
    value."""
    needed = {name for name, field in config.model_fields.items() if field.is_required()}
    found = {name: getattr(model, name) for name in model.model_fields_set - {"name", "step"}}
    return {name: value for name, value in found.items() if value is not None or name not in needed}


def _values(kind: str, said: dict[str, Any], above: _Above) -> dict[str, Any]:
    """A step's settings: its own, then its stage's, then those of `defaults` and of the steps above."""
    values = above.shared(KINDS[kind].shared)
    public = kind == "eval" and bool(said.get("benchmarks") or said.get("suite"))  # no data of one's own
    if kind != "report":
        own = kind == "eval" or "data" in said  # of other data, only how records are read is shared
        values |= above.shared(_OF_DATA - WHICH_SAMPLES if own else _OF_DATA)
    train_steps = above.names["train"]
    if kind == "train":
        if train_steps:
            _require_student(said, above)
            values["student"] = train_steps[-1]
        values |= _said(above.defaults["train"], TrainConfig) if above.defaults.get("train") else {}
        values |= STAGES[said["stage"]] if said.get("stage") is not None else {}
    elif kind == "eval":
        values["models"] = train_steps
        if said.get("cache") is not None:
            values.pop("teacher", None)
        if public:
            values = {name: value for name, value in values.items() if name not in OF_OWN_DATA}
        elif "data" in above.defaults:  # the training data, of which nothing is as in this step's own
            values["prior_data"] = defaults_of(DataOptions) | above.shared(_OF_DATA)
    elif kind == "report" and train_steps:
        values["run"] = train_steps[-1]
    values |= said
    taken = {name: kind for kind, names in _TAKES.items() for name in names if name in values}
    return values | {name: above.folder(values[name], kind) for name, kind in taken.items()}


def _require_student(said: dict[str, Any], above: _Above) -> None:
    """A stage goes on with what the stage before made; of any other step that would be a guess, and a wrong
    one another experiment.

    Raises:
        CachekdError: it is not said whose student it takes.
    """
    if {"stage", "student"}.isdisjoint(said):
        previous, anew = above.names["train"][-1], above.defaults.get("student") or "PATH"
        raise CachekdError(
            "it is not said which student the step trains",
            where="setting 'student'",
            fix=f"`student: {previous}` goes on with what that step made; `student: {anew}` begins anew",
        )


def _planned(name: str, kind: str, config: Any, above: _Above) -> PlannedStep:
    if kind == "train":
        config = _with_its_inputs(config, above)
    made = {str(above.folders[other]): other for names in above.names.values() for other in names}
    models, caches, runs = (_paths(config, *names) for names in (("teacher", *_MODELS), _CACHES, _RUNS))
    taken = [made[path] for path in (*models, *caches, *runs) if path in made]
    if kind == "report":
        taken += above.names["eval"]  # whose scores are in the runs
    others = {setting: getattr(config, setting, None) for setting in ("eval_data", "prior_data")}
    data = {} if kind == "report" or getattr(config, "data", None) is None else {"data": config}
    manifests = (Path(cache, MANIFEST_FILE) for cache in caches if cache not in made)
    return PlannedStep(
        name,
        kind,
        config,
        upstream=tuple(dict.fromkeys(taken)),
        models=tuple(dict.fromkeys(path for path in models if path not in made)),
        data=data | {key: one.inheriting_from(config) for key, one in others.items() if one is not None},
        files=(*manifests, *map(Path, _paths(config, "binding")), *_of_benchmarks(config)),
        continues=made.get(getattr(config, "student", None) or ""),
    )


def _paths(config: Config, *settings: str) -> list[str]:
    """What some settings name, one or several each; those that a config has not, or not set, name nothing."""
    values = [getattr(config, name, None) or [] for name in settings]
    return [path for value in values for path in (value if isinstance(value, list) else [str(value)])]


def _of_benchmarks(config: Config) -> list[Path]:
    """The files of an eval step's own tasks, and of benchmarks whose data are in folders. Of what `datasets`
    saved those are enough in which it notes its fingerprint."""
    if not isinstance(config, EvalConfig):
        return []
    tasks = config.tasks_dir
    found = [] if tasks is None else sorted([*tasks.rglob("*.yaml"), *tasks.rglob("*.py")])
    for data in map(Path, config.folders.values()):
        saved = (data / DATASET_DICT).is_file()
        found += sorted(data.rglob("*.json") if saved else filter(Path.is_file, data.rglob("*")))
    return found


def _with_its_inputs(config: TrainConfig, above: _Above) -> TrainConfig:
    """The cache above, if a term needs one; no teacher where none does.

    Raises:
        CachekdError: there is none.
    """
    dumped = [str(above.folders[dump]) for dump in above.names["dump"]]
    update: dict[str, Any] = {}
    if above.without_idle:
        update |= {name: TrainConfig.model_fields[name].get_default() for name in config.idle}
    if not config.distils:
        update |= {"cache": None, "eval_cache": None}
    elif not config.live_teacher and "cache" not in config.model_fields_set and dumped:
        of_training = [cache for cache in dumped if cache != config.eval_cache]
        update["cache"] = (of_training or dumped)[-1]
    if not config.runs_teacher:
        update["teacher"] = None
    config = config.model_copy(update=update)
    config.require_inputs()
    return config
