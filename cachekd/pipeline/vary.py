"""One file, many runs: the points of a pipeline that varies, and which of them share a step.

A point is one value of every axis, and a seed. A step is done once for all points at which the same values
reach it: those that set something of it, or of a step whose output it takes. So its folder depends on those
values alone, and a value or a seed that comes later leaves what is finished where it is.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cachekd.config import refusal
from cachekd.config.base import Mistake
from cachekd.errors import CachekdError, about
from cachekd.pipeline.axes import DEFAULTS, Axis, Value, axes_of, put
from cachekd.pipeline.config import PipelineConfig
from cachekd.pipeline.plan import PlannedStep, plan_steps, settings_said

_Settings = dict[str, dict[str, Any]]  # by step
_SEED = "{seed}"
_MOST_POINTS = 10_000
_LONGEST = 200  # bytes; a folder's name has 255 at most


@dataclass(frozen=True)
class Group:
    """Steps that the same values reach, done together in one folder with one state.

    Attributes:
        label: its folder in the pipeline's, such as "ce,limit=250/seed-3"; empty for what no axis reaches.
        out: that folder.
        variant: of each axis that reaches it, the value's name.
        seed: of its runs; None where no step depends on one.
        steps: by name, in order.
        needs: labels of the groups whose output its steps take.
    """

    label: str
    out: Path
    variant: dict[str, str]
    seed: int | None
    steps: dict[str, PlannedStep] = field(default_factory=dict)
    needs: set[str] = field(default_factory=set)

    @property
    def title(self) -> str:
        """What it is called in a message."""
        return self.label or "what all runs share"


@dataclass(frozen=True)
class Point:
    """One value of every axis, and a seed.

    Attributes:
        variant: of every axis, the value's name.
        seed: None where the file has no `seeds`.
        steps: by name, those that are shared with other points included.
        groups: by the step's name, the label of the group that does it.
    """

    variant: dict[str, str]
    seed: int | None
    steps: dict[str, PlannedStep]
    groups: dict[str, str]

    @property
    def label(self) -> str:
        """Its values, such as "ce,limit=250"."""
        return ",".join(self.variant.values())

    @property
    def name(self) -> str:
        """Its values and its seed, such as "ce,limit=250/seed-3"."""
        return _label(self.variant.values(), self.seed)


@dataclass(frozen=True)
class Sweep:
    """All that a pipeline's file asks for.

    Attributes:
        axes: as the file has them.
        groups: by label, each after those that it needs.
        points: all values with the first seed, then with the next.
    """

    pipeline: PipelineConfig
    axes: list[Axis]
    groups: dict[str, Group]
    points: list[Point]

    @property
    def varies(self) -> bool:
        """Whether the file has axes or seeds."""
        return bool(self.axes) or self.pipeline.seeds is not None


def expand(pipeline: PipelineConfig) -> Sweep:
    """Every point of a pipeline with its whole settings, checked before anything runs.

    Raises:
        CachekdError: settings are missing or do not go with others, of which the point and the step are
            named; or an axis changes nothing.
    """
    axes = axes_of(pipeline.vary)
    _require_a_few(pipeline, axes)
    variants = [_Variant(pipeline, values) for values in itertools.product(*(axis.values for axis in axes))]
    _require_change(pipeline, axes, variants)
    groups: dict[str, Group] = {}
    seeds: Sequence[int | None] = pipeline.seeds or [None]
    points = [_point(variant, axes, seed, groups) for seed in seeds for variant in variants]
    return Sweep(pipeline, axes, _in_order(pipeline, groups), points)


def _in_order(pipeline: PipelineConfig, groups: dict[str, Group]) -> dict[str, Group]:
    """The groups as the points have them, each after those that it needs; their steps as in the file."""
    ordered: dict[str, Group] = {}

    def add(label: str) -> None:
        if label not in ordered:
            for need in sorted(groups[label].needs, key=list(groups).index):
                add(need)
            ordered[label] = groups[label]

    for label, group in groups.items():
        add(label)
        names = [step.name for step in pipeline.steps if step.name in group.steps]
        ordered[label] = replace(group, steps={name: group.steps[name] for name in names})
    return ordered


class _Variant:
    """The file with one value of every axis.

    Attributes:
        said: what the file would say.
        plan: its steps, as if it stood alone.
        reaching: by step, the values that reach it, by themselves or through what it takes.
        seeded: the steps that depend on the seed.
    """

    def __init__(self, pipeline: PipelineConfig, values: tuple[Value, ...]) -> None:
        self.values = values
        file = pipeline.model_dump(exclude_unset=True, exclude={"vary", "seeds", "baseline"})
        self.said = PipelineConfig(**_with(deepcopy(file), values)) if values else pipeline
        with about(self.label, what="variant") if values else nullcontext():
            self.plan = {step.name: step for step in plan_steps(self.said)}
        settings = settings_said(self.said)
        own = {value.name: self._reached_by(value, settings, file) for value in values}
        self.reaching: dict[str, list[Value]] = {}
        self.seeded: set[str] = set()
        for name, step in self.plan.items():
            through = {value.name for above in step.upstream for value in self.reaching[above]}
            self.reaching[name] = [one for one in values if one.name in through or name in own[one.name]]
            if (
                step.kind == "train"
                or _SEED in str(settings[name])
                or self.seeded.intersection(step.upstream)
            ):
                self.seeded.add(name)

    @property
    def label(self) -> str:
        return _label((value.name for value in self.values), None)

    @property
    def signature(self) -> str:
        """What is done, wherever it is written."""
        return json.dumps([step.config.deciding() for step in self.plan.values()], sort_keys=True)

    def _reached_by(
        self, value: Value, settings: dict[str, dict[str, Any]], file: dict[str, Any]
    ) -> set[str]:
        """The steps of which it sets something that they use. Of `defaults` that is what makes them another
        step than they are without it, or than the file says."""
        others = []
        defaults: dict[str, Any]
        for defaults in (file.get(DEFAULTS, {}), {}):
            said = self.said.model_dump(exclude_unset=True)
            for path in value.settings:
                if path[0] == DEFAULTS:
                    _set_as_in(said, {DEFAULTS: defaults}, path)
            others.append(settings_said(PipelineConfig(**said)))
        reached = set()
        for name, step in self.plan.items():
            # A cache or a teacher that no term needs is left out of the plan.
            unused = {
                setting
                for setting, said in settings[name].items()
                if said is not None and getattr(step.config, setting) is None
            }
            own = value.of_each().get(name, {}).keys() - unused
            used = _but(unused, settings[name])
            if own or any(used != _but(unused, other[name]) for other in others):
                reached.add(name)
        return reached


def _point(variant: _Variant, axes: list[Axis], seed: int | None, groups: dict[str, Group]) -> Point:
    """A point's steps, each in its group's folder; groups that are not there yet are made."""
    said = variant.said if seed is None else PipelineConfig(**_with_seed(variant, seed))
    seeds = {name: seed if name in variant.seeded else None for name in variant.plan}
    reaching = {
        name: {value.axis: value.name for value in values} for name, values in variant.reaching.items()
    }
    labels = {name: _label(reaching[name].values(), seeds[name]) for name in variant.plan}
    with about(variant.label, what="variant") if variant.values else nullcontext():
        plan = plan_steps(said, {name: said.out / label for name, label in labels.items()})
    plan = [replace(step, group=labels[step.name]) for step in plan]
    for step in plan:
        name, label = step.name, labels[step.name]
        group = groups.setdefault(label, Group(label, said.out / label, reaching[name], seeds[name]))
        if group.steps.setdefault(name, step).config.model_dump() != step.config.model_dump():
            raise AssertionError(f"{step.what} {name!r} has other settings at {variant.label}")
        group.needs.update(labels[above] for above in step.upstream if labels[above] != label)
    all_values = {value.axis: value.name for value in variant.values}
    return Point(all_values, seed, {step.name: step for step in plan}, labels)


def _label(values: Iterable[str], seed: int | None) -> str:
    parts = [",".join(values), "" if seed is None else f"seed-{seed}"]
    return "/".join(part for part in parts if part)


def _with(said: dict[str, Any], values: Iterable[Value]) -> dict[str, Any]:
    """What a file says, with what the values set of it."""
    steps = {step["name"]: step for step in said["steps"]}
    for value in values:
        for path, setting in value.settings.items():
            if path[0] == DEFAULTS:
                put(said, path, setting)
            else:
                put(steps[path[0]], path[1:], setting)
    return said


def _with_seed(variant: _Variant, seed: int) -> dict[str, Any]:
    said = variant.said.model_dump(exclude_unset=True, exclude={"vary", "seeds", "baseline"})
    for step in said["steps"]:
        if step["step"] == "train":
            step["seed"] = seed
    return said | {part: _replaced(said[part], seed) for part in ("defaults", "steps") if part in said}


def _replaced(value: Any, seed: int) -> Any:
    """A value with every `{seed}` in its texts replaced."""
    if isinstance(value, dict):
        return {name: _replaced(one, seed) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(one, seed) for one in value]
    if isinstance(value, str | Path):
        return type(value)(str(value).replace(_SEED, str(seed)))
    return value


def _set_as_in(said: dict[str, Any], other: dict[str, Any], path: tuple[str, ...]) -> None:
    """Set a value to what another file says there, or to nothing."""
    for name in path[:-1]:
        said, other = said[name], other.get(name) or {}
    if path[-1] in other:
        said[path[-1]] = other[path[-1]]
    else:
        said.pop(path[-1], None)


def _but(names: set[str], settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _require_a_few(pipeline: PipelineConfig, axes: list[Axis]) -> None:
    """Refuse more points than anybody means, and folders whose names no disk takes."""
    points = math.prod(len(axis.values) for axis in axes) * len(pipeline.seeds or [None])
    if points > _MOST_POINTS:
        raise CachekdError(
            "the file asks for more runs than one pipeline has",
            where=pipeline.place("vary"),
            expected=f"at most {_MOST_POINTS:,}",
            found=f"{points:,}: every value of every axis with every other, and every seed",
        )
    longest = sum(1 + max(len(value.name) for value in axis.values) for axis in axes)
    if longest > _LONGEST:
        raise CachekdError(
            "the values' names are too long for the name of a folder",
            where=pipeline.place("vary"),
            expected=f"at most {_LONGEST} characters, one of each axis together",
            found=f"{longest}",
            fix="name them yourself: AXIS: {NAME: {STEP: {SETTING: VALUE}}}",
        )


def _require_change(pipeline: PipelineConfig, axes: list[Axis], variants: list[_Variant]) -> None:
    """Refuse values that reach no step, and two of an axis that are the same everywhere.

    Raises:
        CachekdError: all such values, with their lines.
    """
    mistakes = []
    for number, axis in enumerate(axes):
        used = {one.name for each in variants for reaching in each.reaching.values() for one in reaching}
        alike: dict[tuple[str, ...], str] = {}
        for value in axis.values:
            with_it = tuple(one.signature for one in variants if one.values[number] is value)
            if value.name not in used and (value.settings or len(axis.values) == 1):
                problem = f"value {value.name!r} of axis {axis.name!r} changes no step"
            elif with_it in alike:
                problem = f"values {alike[with_it]!r} and {value.name!r} of axis {axis.name!r} are the same"
            else:
                alike[with_it] = value.name
                continue
            mistakes.append(Mistake(problem, pipeline.place("vary", *value.where), value.of_each()))
    if mistakes:
        raise refusal(mistakes)
