"""One file, many runs: the points of a pipeline that varies, and which of them share a step.

A point is one value of every axis, and a seed. A step is done once for all points at which the same values
reach it: those that set something of it, or of a step whose output it takes. So its folder depends on those
values alone, and a value or a seed that comes later leaves what is finished where it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cachekd.config import refusal
from cachekd.config.base import Mistake
from cachekd.errors import CachekdError
from cachekd.pipeline.axes import Axis, axes_of
from cachekd.pipeline.config import PipelineConfig
from cachekd.pipeline.plan import PlannedStep, plan_steps
from cachekd.pipeline.variant import Variant, label_of

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
        return label_of(self.variant.values(), self.seed)


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
    variants = [Variant(pipeline, values) for values in itertools.product(*(axis.values for axis in axes))]
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


def _point(variant: Variant, axes: list[Axis], seed: int | None, groups: dict[str, Group]) -> Point:
    """A point's steps, each in its group's folder; groups that are not there yet are made."""
    said = variant.with_seed(seed)
    seeds = {name: seed if name in variant.seeded else None for name in variant.plan}
    reaching = {
        name: {value.axis: value.name for value in values} for name, values in variant.reaching.items()
    }
    labels = {name: label_of(reaching[name].values(), seeds[name]) for name in variant.plan}
    with variant.about():
        folders = {name: said.out / label for name, label in labels.items()}
        plan = plan_steps(said, folders, without_idle=bool(variant.values))
    plan = [replace(step, group=labels[step.name]) for step in plan]
    for step in plan:
        name, label = step.name, labels[step.name]
        group = groups.setdefault(label, Group(label, said.out / label, reaching[name], seeds[name]))
        if group.steps.setdefault(name, step).config.model_dump() != step.config.model_dump():
            raise AssertionError(f"{step.what} {name!r} has other settings at {variant.label}")
        group.needs.update(labels[above] for above in step.upstream if labels[above] != label)
    all_values = {value.axis: value.name for value in variant.values}
    return Point(all_values, seed, {step.name: step for step in plan}, labels)


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


def _require_change(pipeline: PipelineConfig, axes: list[Axis], variants: list[Variant]) -> None:
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
