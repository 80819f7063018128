"""A pipeline's steps with everything said: whole settings, folders, and which step takes what from which."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cachekd.cache.manifest import MANIFEST_FILE
from cachekd.config import DumpConfig, TrainConfig, defaults_of
from cachekd.config_file import Config
from cachekd.data_options import OF_ONE_SET, DataOptions
from cachekd.errors import CachekdError, within
from cachekd.files import REPORT_FILE, RUN_FILE
from cachekd.pipeline.config import EvalConfig, PipelineConfig, ReportConfig
from cachekd.run_folder import FREE_SETTINGS
from cachekd.stages import STAGES

SCORES_FILE = "scores.json"
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
    "eval": {"out", "batch_size"},
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
        held_out: that it evaluates meanwhile.
        files: others that it reads and no step makes: a cache's manifest, a binding.
    """

    name: str
    kind: str
    config: Any
    upstream: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    data: DataOptions | None = None
    held_out: DataOptions | None = None
    files: tuple[Path, ...] = ()

    @property
    def out(self) -> Path:
        return self.config.out

    @property
    def finished(self) -> bool:
        """Whether its last file is there. Whether all are: `damage_of`."""
        return (self.out / LAST_FILE[self.kind]).exists()

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the output."""
        return self.config.model_dump(mode="json", exclude=FREE[self.kind])

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
        CachekdError: a setting is missing or out of range, or does not go with another; the step is named.
    """
    above = _Above(pipeline.out, _said(pipeline.defaults))
    steps = []
    for step in pipeline.steps:
        values = {**_VALUES[step.step](_said(step), above), "out": pipeline.out / step.name}
        steps.append(_planned(step.name, step.step, _config(step.name, step.step, values), above))
        above.of_kind[step.step].append(step.name)
    return steps


def _said(model: Config) -> dict[str, Any]:
    """The settings that the file has."""
    found = {name: getattr(model, name) for name in model.model_fields_set - {"name", "step"}}
    return {name: value for name, value in found.items() if value is not None}


def _dump_values(said: dict[str, Any], above: _Above) -> dict[str, Any]:
    return {**_shared(above, "teacher", "dtype", "workers"), **_data_shared(said, above), **said}


def _train_values(said: dict[str, Any], above: _Above) -> dict[str, Any]:
    shared = _shared(above, "teacher", "student", "dtype", "workers") | _data_shared(said, above)
    if (previous := above.last("train")) is not None:
        shared["student"] = previous
    preset = STAGES[said["stage"]] if "stage" in said else {}
    of_all = _said(above.defaults["train"]) if "train" in above.defaults else {}
    values = {**shared, **of_all, **preset, **said}
    if "student" in values:
        values["student"] = above.folder(values["student"], "train")
    for name in ("cache", "eval_cache"):
        if name in values:
            values[name] = above.folder(values[name], "dump")
    return values


def _eval_values(said: dict[str, Any], above: _Above) -> dict[str, Any]:
    shared = _shared(above, "teacher", *_OF_DATA - OF_ONE_SET)  # held-out data have to be named
    values = {**shared, "models": above.of_kind["train"], **said}
    return {**values, "models": [above.folder(name, "train") for name in values["models"]]}


def _report_values(said: dict[str, Any], above: _Above) -> dict[str, Any]:
    last = above.last("train")
    values = {**({} if last is None else {"run": last}), "baselines": [], **said}
    if "run" in values:
        values["run"] = above.folder(values["run"], "train")
    return {**values, "baselines": [above.folder(name, "train") for name in values["baselines"]]}


_VALUES = {"dump": _dump_values, "train": _train_values, "eval": _eval_values, "report": _report_values}


def _data_shared(said: dict[str, Any], above: _Above) -> dict[str, Any]:
    """Of a step that names data of its own, only how records are read."""
    return _shared(above, *(_OF_DATA - OF_ONE_SET if "data" in said else _OF_DATA))


def _shared(above: _Above, *names: str) -> dict[str, Any]:
    return {name: above.defaults[name] for name in names if name in above.defaults}


def _config(name: str, kind: str, values: dict[str, Any]) -> Any:
    try:
        return CONFIGS[kind](**values)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(str(part) for part in first["loc"])
        raise CachekdError(
            f"setting {setting!r}: {first['msg'].lower()}",
            where=f"step {name!r}",
            found=None if first["type"] == "missing" else first.get("input"),
            fix=f"say it in the step, or in `defaults`: {CONFIGS[kind].model_fields[setting].description}"
            if first["type"] == "missing"
            else None,
        ) from None
    except CachekdError as error:
        raise in_step(name, error) from None


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
        held_out=config.on_held_out() if kind == "train" else None,
        files=_files(config, made) if kind == "train" else (),
    )


def _files(config: TrainConfig, made: dict[str, str]) -> tuple[Path, ...]:
    """A published cache at an address is none: it counts by its name."""
    given = [cache for cache in _caches(config) if cache not in made]
    return (
        *(Path(cache, MANIFEST_FILE) for cache in given),
        *((config.binding,) if config.binding is not None else ()),
    )


def _reads(kind: str, config: Any) -> tuple[list[str], list[str]]:
    """Model folders or hub names, and what else may be the output of a step."""
    if kind == "report":
        return [], [config.run, *config.baselines]
    models = [] if config.teacher is None else [config.teacher]
    if kind == "eval":
        return [*models, *config.models], []
    if kind == "dump":
        return models, []
    return [*models, config.student], _caches(config)


def _caches(config: TrainConfig) -> list[str]:
    """Of the training data, and of the held-out ones."""
    return [cache for cache in (config.cache, config.eval_cache) if cache is not None]


def _with_its_inputs(name: str, config: TrainConfig, above: _Above) -> TrainConfig:
    """The cache above, if a term needs one; no teacher where none does."""
    dumped = [str(above.out / dump) for dump in above.of_kind["dump"]]
    if config.distils and not config.live_teacher and config.cache is None and dumped:
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
