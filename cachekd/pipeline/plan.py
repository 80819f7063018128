"""A pipeline's steps with everything said: whole settings, folders, and which step takes what from which."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cachekd.config import FREE_SETTINGS, DumpConfig, EvalConfig, TrainConfig, defaults_of, samples_per_step
from cachekd.config_file import Config, Mistake, refusal
from cachekd.data_options import WHICH_SAMPLES, DataOptions
from cachekd.errors import CachekdError, within
from cachekd.files import MANIFEST_FILE, REPORT_FILE, RUN_FILE, SCORES_FILE
from cachekd.pipeline.config import Defaults, PipelineConfig, ReportConfig
from cachekd.stages import STAGES

CONFIGS: dict[str, type[Config]] = {
    "dump": DumpConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "report": ReportConfig,
}
# Written last: where it is, the step is finished.
LAST_FILE = {"dump": MANIFEST_FILE, "train": RUN_FILE, "eval": SCORES_FILE, "report": REPORT_FILE}
# Settings that do not change what comes out.
FREE = {
    "dump": {"out", "workers", "rank", "world_size", "on_error", "batch_size"},  # as `same_plan` has it
    "train": FREE_SETTINGS,
    "eval": {"out", "batch_size", "workers"},
    "report": {"out"},
}


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
        data: that it reads.
        other_data: other data sets, by the setting that names them: held-out ones, those of a prior.
        files: others that it reads and no step makes: a cache's manifest, a binding.
    """

    name: str
    kind: str
    config: Any
    upstream: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    data: DataOptions | None = None
    other_data: dict[str, DataOptions] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def out(self) -> Path:
        return self.config.out

    @property
    def continues(self) -> str | None:
        """The train step above whose student this one goes on with."""
        student = getattr(self.config, "student", None)
        return next((name for name in self.upstream if str(self.out.parent / name) == student), None)

    @property
    def finished(self) -> bool:
        """Whether its last file is there. Whether all are: `damage_of`."""
        return (self.out / LAST_FILE[self.kind]).exists()

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the output."""
        return self.config.model_dump(mode="json", exclude=FREE[self.kind])

    def comparable(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings, now or of a record, with only what has to be equal of them."""
        return samples_per_step(settings) if self.kind == "train" else settings

    @property
    def defaults(self) -> dict[str, Any]:
        """What a setting is that a record does not have, because there was no such setting yet."""
        return defaults_of(CONFIGS[self.kind])


@dataclass
class _Above:
    """What the steps so far offer to the next."""

    out: Path
    defaults: dict[str, Any]
    of_kind: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in CONFIGS})

    def last(self, kind: str) -> str | None:
        return self.of_kind[kind][-1] if self.of_kind[kind] else None

    def folder(self, name: str, kind: str) -> str:
        """The folder of a step above, or the path or hub name that it is."""
        return str(self.out / name) if name in self.of_kind[kind] else name


def plan_steps(pipeline: PipelineConfig) -> list[PlannedStep]:
    """Every step with its whole settings, checked before any of them runs.

    Raises:
        CachekdError: settings are missing, or do not go with others; their steps are named.
    """
    above = _Above(pipeline.out, _said(pipeline.defaults, Defaults))
    steps: list[PlannedStep] = []
    mistakes: list[Mistake] = []
    for step in pipeline.steps:
        said = _said(step, CONFIGS[step.step])
        if step.step == "train":
            _require_student(step.name, said, above)
        values = {**_VALUES[step.step](said, above), "out": pipeline.out / step.name}
        try:
            steps.append(_planned(step.name, step.step, _config(step.name, step.step, values), above))
        except ValidationError as error:
            mistakes += _mistakes(step.name, step.step, error)
        except CachekdError:
            if not mistakes:
                raise
        above.of_kind[step.step].append(step.name)
    if mistakes:
        raise refusal(mistakes, "say it in the step, or in `defaults`")
    return steps


def _said(model: Config, config: type[Config]) -> dict[str, Any]:
    """The settings that the file has. A null is one, and turns a preset off; but not where `config` needs a
    value."""
    needed = {name for name, field in config.model_fields.items() if field.is_required()}
    found = {name: getattr(model, name) for name in model.model_fields_set - {"name", "step"}}
    return {name: value for name, value in found.items() if value is not None or name not in needed}


def _dump_values(said: dict[str, Any], above: _Above) -> dict[str, Any]:
    return {
        **_shared(above, "teacher", "dtype", "workers"),
        **_data_shared(above, own="data" in said),
        **said,
    }


def _require_student(name: str, said: dict[str, Any], above: _Above) -> None:
    """A stage goes on with what the stage before made; of any other step that would be a guess, and a wrong
    one another experiment.

    Raises:
        CachekdError: it is not said whose student it takes.
    """
    previous, anew = above.last("train"), above.defaults.get("student") or "PATH"
    if previous is None or not {"stage", "student"}.isdisjoint(said):
        return
    error = CachekdError(
        "it is not said which student the step trains",
        where="setting 'student'",
        fix=f"`student: {previous}` goes on with what that step made; `student: {anew}` begins anew",
    )
    raise in_step(name, error)


def _train_values(said: dict[str, Any], above: _Above) -> dict[str, Any]:
    shared = _shared(above, "teacher", "student", "dtype", "workers")
    shared |= _data_shared(above, own="data" in said)
    if (previous := above.last("train")) is not None:
        shared["student"] = previous
    preset = STAGES[said["stage"]] if said.get("stage") is not None else {}
    of_all = {} if (train := above.defaults.get("train")) is None else _said(train, TrainConfig)
    values = {**shared, **of_all, **preset, **said}
    if "student" in values:
        values["student"] = above.folder(values["student"], "train")
    for name in ("cache", "eval_cache"):
        if name in values:
            values[name] = above.folder(values[name], "dump")
    return values


def _eval_values(said: dict[str, Any], above: _Above) -> dict[str, Any]:
    shared = _data_shared(above, own=True)  # held-out data have to be named
    if said.get("cache") is not None:
        said = {**said, "cache": above.folder(said["cache"], "dump")}
    else:
        shared |= _shared(above, "teacher")
    if "data" in above.defaults:  # the training data, of which nothing is as in this step's own
        shared["prior_data"] = defaults_of(DataOptions) | _shared(above, *_OF_DATA)
    values = {**shared, "models": above.of_kind["train"], **said}
    return {**values, "models": [above.folder(name, "train") for name in values["models"]]}


def _report_values(said: dict[str, Any], above: _Above) -> dict[str, Any]:
    last = above.last("train")
    values = {**({} if last is None else {"run": last}), "baselines": [], **said}
    if "run" in values:
        values["run"] = above.folder(values["run"], "train")
    return {**values, "baselines": [above.folder(name, "train") for name in values["baselines"]]}


_VALUES = {"dump": _dump_values, "train": _train_values, "eval": _eval_values, "report": _report_values}


def _data_shared(above: _Above, *, own: bool) -> dict[str, Any]:
    """Of a step with data of its own, only how records are read."""
    return _shared(above, *(_OF_DATA - WHICH_SAMPLES if own else _OF_DATA))


def _shared(above: _Above, *names: str) -> dict[str, Any]:
    return {name: above.defaults[name] for name in names if above.defaults.get(name) is not None}


def _config(name: str, kind: str, values: dict[str, Any]) -> Any:
    try:
        return CONFIGS[kind](**values)
    except CachekdError as error:
        raise in_step(name, error) from None


def _mistakes(name: str, kind: str, error: ValidationError) -> list[Mistake]:
    """What is missing, and what does not go with something else: of the rest `read_pipeline` has told."""
    fields = CONFIGS[kind].model_fields
    return [
        Mistake.of(each, ".".join(map(str, each["loc"])), f"step {name!r}", fields) for each in error.errors()
    ]


def _planned(name: str, kind: str, config: Any, above: _Above) -> PlannedStep:
    if kind == "train":
        config = _with_its_inputs(name, config, above)
    made = {str(above.out / other): other for names in above.of_kind.values() for other in names}
    models, others = _reads(kind, config)
    upstream = [made[path] for path in [*models, *others] if path in made]
    if kind == "report":
        upstream += above.of_kind["eval"]  # whose scores are in the runs
    return PlannedStep(
        name,
        kind,
        config,
        upstream=tuple(dict.fromkeys(upstream)),
        models=tuple(dict.fromkeys(path for path in models if path not in made)),
        data=config if kind != "report" else None,
        other_data=_other_data(config),
        files=_files(config, made),
    )


def _other_data(config: Any) -> dict[str, DataOptions]:
    said = {name: getattr(config, name, None) for name in ("eval_data", "prior_data")}
    return {name: data.inheriting_from(config) for name, data in said.items() if data is not None}


def _files(config: Any, made: dict[str, str]) -> tuple[Path, ...]:
    """A published cache at an address is none: it counts by its name."""
    given = [cache for cache in _caches(config) if cache not in made]
    binding = getattr(config, "binding", None)
    return (*(Path(cache, MANIFEST_FILE) for cache in given), *(() if binding is None else (binding,)))


def _reads(kind: str, config: Any) -> tuple[list[str], list[str]]:
    """Model folders or hub names, and what else may be the output of a step."""
    if kind == "report":
        return [], [config.run, *config.baselines]
    models = [] if config.teacher is None else [config.teacher]
    if kind == "eval":
        return [*models, *config.models], _caches(config)
    if kind == "dump":
        return models, []
    return [*models, config.student], _caches(config)


def _caches(config: Any) -> list[str]:
    """Of the step's data, and of held-out ones."""
    caches = (getattr(config, name, None) for name in ("cache", "eval_cache"))
    return [cache for cache in caches if cache is not None]


def _with_its_inputs(name: str, config: TrainConfig, above: _Above) -> TrainConfig:
    """The cache above, if a term needs one; no teacher where none does."""
    dumped = [str(above.out / dump) for dump in above.of_kind["dump"]]
    if config.distils and not config.live_teacher and "cache" not in config.model_fields_set and dumped:
        of_training = [cache for cache in dumped if cache != config.eval_cache]
        config = config.model_copy(update={"cache": (of_training or dumped)[-1]})
    if not config.distils:
        config = config.model_copy(update={"cache": None, "eval_cache": None})
    if not config.runs_teacher:
        config = config.model_copy(update={"teacher": None})
    try:
        config.require_inputs()
    except CachekdError as error:
        raise in_step(name, error) from None
    return config


def in_step(name: str, error: CachekdError, then: str | None = None) -> CachekdError:
    """The same error, with the step's name and how to go on."""
    return within(f"step {name!r}", error, then)
