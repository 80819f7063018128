"""A pipeline's file: its steps, what they share, and along which axes they vary."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from cachekd.config import Config, refusal
from cachekd.config.base import Mistake, YamlFile
from cachekd.errors import CachekdError, did_you_mean, nearest, some_of, within
from cachekd.paths import LocalPath, expanded
from cachekd.pipeline.axes import DEFAULTS, axes_of, mistakes_in
from cachekd.pipeline.steps import STEPS, Defaults, DumpStep, EvalStep, ReportStep, TrainStep


def _first_so_many(value: Any) -> Any:
    if value is None or isinstance(value, list):
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("how many, such as 5, or a list of them")
    if not 1 <= value <= _MOST_SEEDS:
        raise ValueError(f"from 1 to {_MOST_SEEDS:,} seeds")
    return list(range(value))


_MOST_SEEDS = 1_000
Seeds = Annotated[
    Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None,
    BeforeValidator(_first_so_many, json_schema_input_type=int | list[int] | None),
]
_Variants = Annotated[dict[str, dict[str, dict[str, Any]]], Tag("variants")]
_Values = Annotated[list[Any], Tag("values")]
Axes = dict[
    str,
    Annotated[_Variants | _Values, Discriminator(lambda v: "values" if isinstance(v, list) else "variants")],
]


def _may_extend(schema: dict[str, Any]) -> None:
    """A file that extends another may have its steps from there."""
    schema["required"].remove("steps")
    schema["anyOf"] = [{"required": ["steps"]}, {"required": ["extends"]}]


class PipelineConfig(Config):
    """`pipeline.yaml`."""

    model_config = ConfigDict(json_schema_extra=_may_extend)

    extends: LocalPath | None = Field(
        None,
        description="another such file, by its path from this one's folder, all of whose settings count that "
        "do not stand here; `out` does",
    )
    out: LocalPath = Field(description="the pipeline's folder: a folder for every step, and the state")
    defaults: Defaults = Defaults()
    steps: list[Annotated[DumpStep | TrainStep | EvalStep | ReportStep, Field(discriminator="step")]] = Field(
        min_length=1, description="in this order"
    )
    seeds: Seeds = Field(
        None,
        description="every train step with each of these seeds; a number, such as 5: 0 to 4. `{seed}` in a "
        "text setting is replaced",
    )
    vary: Axes = Field(
        {},
        description="axes, of which every combination is run: named variants, {axis: {name: {step: {setting: "
        "value}}}}, or the values of one setting, {step.setting: [value, ...]}",
    )
    baseline: str | None = Field(
        None,
        description="the value of an axis that the others are compared with; by default the first's first",
    )
    _file: YamlFile | None = PrivateAttr(None)

    @field_validator("steps")
    @classmethod
    def _have_their_own_names(cls, value: list[Any]) -> list[Any]:
        names = [step.name for step in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two steps are called {twice[0]!r}")
        return value

    @field_validator("seeds")
    @classmethod
    def _are_the_only_seeds(cls, value: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if value is None:
            return None
        if len(set(value)) < len(value):
            raise ValueError("a seed is named twice")
        steps = info.data.get("steps", [])
        owners = {f"step {step.name!r}": step for step in steps if step.step == "train"}
        owners["`defaults.train`"] = getattr(info.data.get("defaults"), "train", None)
        for who, settings in owners.items():
            if settings is not None and "seed" in settings.model_fields_set:
                raise ValueError(f"{who} has a seed of its own: leave one of the two out")
        if clash := {f"seed-{seed}" for seed in value} & {step.name for step in steps}:
            raise ValueError(f"step {clash.pop()!r} is called as the folder of a seed")
        return value

    @field_validator("vary")
    @classmethod
    def _vary_what_there_is(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        steps = info.data.get("steps")
        if steps is None:  # what is wrong with them is said first
            return value
        models: dict[str, Any] = dict(STEPS)
        takes = {step.name: partial(models[step.step], name=step.name, step=step.step) for step in steps}
        seeded = info.data.get("seeds") is not None
        mistakes = list(mistakes_in(value, {**takes, DEFAULTS: Defaults}, seeded=seeded))
        if mistakes:
            raise ValidationError.from_exception_data("vary", mistakes)
        return value

    @field_validator("baseline")
    @classmethod
    def _is_a_value(cls, value: str | None, info: ValidationInfo) -> str | None:
        axes = axes_of(info.data.get("vary", {}))
        known = [one.name for axis in axes for one in axis.values]
        if value is not None and "vary" in info.data and value not in known:
            near = did_you_mean(nearest(value, known))
            hint = "" if near is None else f" ({near})"
            there = f"they have {some_of(known)}" if known else "nothing varies"
            raise ValueError(f"no axis has such a value{hint}: {there}")
        return value

    def place(self, *where: str | int) -> str:
        """Say where in the file a setting stands, for a message."""
        return ".".join(map(str, where)) if self._file is None else self._file.place(where)


def read_pipeline(path: Path) -> PipelineConfig:
    """A pipeline from its YAML file.

    Raises:
        CachekdError: it cannot be read, or settings are missing, unknown or out of range; all are named, with
            step and line.
    """
    file = _read(path)
    try:
        pipeline = PipelineConfig(**file.values)
    except ValidationError as error:
        raise refusal([_mistake(each, file) for each in error.errors()]) from None
    pipeline._file = file
    return pipeline


def _read(path: Path) -> YamlFile:
    """A file, with what it has of the one that it extends.

    Raises:
        CachekdError: either cannot be read, they would share a folder, or the other extends one too.
    """
    file = YamlFile.read(path)
    if (other := file.values.get("extends")) is None:
        return file
    place = file.place(("extends",))
    try:
        base = YamlFile.read(path.parent / expanded(str(other)))
    except ValueError as error:  # a variable that is not set
        raise CachekdError(f"setting 'extends': {error}", where=place) from None
    except CachekdError as error:
        raise within(place, error) from None
    problem = None
    if "extends" in base.values:
        problem = f"{base.path} extends another file itself: extend that one, or say it all here"
    elif Path(str(file.values.get("out", base.values.get("out")))) == Path(str(base.values.get("out"))):
        problem = f"it needs an `out` of its own: the one of {base.path} is that pipeline's"
    if problem is not None:
        raise CachekdError(problem, where=place)
    if "vary" in file.values:  # the other's baseline is a value of its own axes
        base.values.pop("baseline", None)
    return file.over(base)


def _mistake(error: Any, file: YamlFile) -> Mistake:
    """Say what is wrong, with the step's name or its number; a setting of a step is called as there."""
    where, place = error["loc"], file.place(error["loc"])
    model: type[Config] = PipelineConfig
    if where[0] == "steps" and len(where) > 1:
        step = file.values["steps"][where[1]]
        name = step.get("name") if isinstance(step, dict) else None
        place += f", step {where[1] + 1 if name is None else repr(name)}"
        if len(where) > 3:
            model, where = STEPS[where[2]], where[3:]
    if where[0] == "vary":
        where = (*where[:2], *(part for part in where[2:] if part not in ("variants", "values")))
    if where[0] == "vary" and error["type"] == "extra_forbidden":  # known settings are those of its step
        target, *setting = str(where[1]).split(".") if len(where) == 2 else where[3:]
        kinds = {step["name"]: step["step"] for step in file.values["steps"]}
        return Mistake.of(error, place, STEPS.get(kinds.get(target, ""), Defaults), tuple(setting))
    if error["type"] == "union_tag_not_found":
        return Mistake("a step needs `step: dump`, `train`, `eval` or `report`", place, error["input"])
    if error["type"] == "union_tag_invalid":
        near = did_you_mean(nearest(error["ctx"]["tag"], STEPS))
        hint = "" if near is None else f" ({near})"
        return Mistake(f"no such step{hint}: it is dump, train, eval or report", place, error["ctx"]["tag"])
    return Mistake.of(error, place, model, where)
