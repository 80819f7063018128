"""The file with one value of every axis: what it says then, and which values reach which step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

from cachekd.errors import about
from cachekd.pipeline.axes import DEFAULTS, Value, put
from cachekd.pipeline.config import PipelineConfig
from cachekd.pipeline.plan import plan_steps, settings_said

_Settings = dict[str, dict[str, Any]]  # by step
_SEED = "{seed}"
_AXES = {"vary", "seeds", "baseline"}


class Variant:
    """The file with one value of every axis.

    Attributes:
        said: what the file would say.
        plan: its steps, as if it stood alone.
        reaching: by step, the values that reach it, by themselves or through what it takes.
        seeded: the steps that depend on the seed.
    """

    def __init__(self, pipeline: PipelineConfig, values: tuple[Value, ...]) -> None:
        self.values = values
        file = pipeline.model_dump(exclude_unset=True, exclude=_AXES)
        self.said = PipelineConfig(**_with(deepcopy(file), values)) if values else pipeline
        with self.about():
            self.plan = {step.name: step for step in plan_steps(self.said, without_idle=bool(values))}
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

    def about(self) -> AbstractContextManager[None]:
        """Name the variant in errors, where the file varies."""
        return about(self.label, what="variant") if self.values else nullcontext()

    @property
    def label(self) -> str:
        return label_of((value.name for value in self.values), None)

    @property
    def signature(self) -> str:
        """What is done, wherever it is written."""
        return json.dumps([step.config.deciding() for step in self.plan.values()], sort_keys=True)

    def with_seed(self, seed: int | None) -> PipelineConfig:
        """The file with a seed in its train steps, and in the place of every `{seed}`."""
        if seed is None:
            return self.said
        said = self.said.model_dump(exclude_unset=True, exclude=_AXES)
        for step in said["steps"]:
            if step["step"] == "train":
                step["seed"] = seed
        parts = {part: _replaced(said[part], seed) for part in (DEFAULTS, "steps") if part in said}
        return PipelineConfig(**said | parts)

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
            # A cache or a teacher that no term needs is left out of the plan, as a loss of such a term is.
            unused = {
                setting
                for setting, said in settings[name].items()
                if said is not None and getattr(step.config, setting) is None
            }
            unused |= step.config.idle if step.kind == "train" else set()
            own = value.of_each().get(name, {}).keys() - unused
            used = _but(unused, settings[name])
            if own or any(used != _but(unused, other[name]) for other in others):
                reached.add(name)
        return reached


def label_of(values: Iterable[str], seed: int | None) -> str:
    """A folder's name: values, and the seed's folder in it."""
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
