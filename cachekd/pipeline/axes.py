"""The axes along which a pipeline's settings vary, as `vary` says them, and what can be wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from cachekd.errors import did_you_mean, nearest

Where = tuple[str | int, ...]  # names, and places in lists, that lead to a setting in the file
DEFAULTS = "defaults"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*")
_MOST = 60  # characters of a value's name, which is a part of a folder's


@dataclass(frozen=True)
class Value:
    """A value of an axis.

    Attributes:
        name: in labels and folders.
        settings: what it sets, each by its path: ("student", "limit"), ("defaults", "train", "epochs").
        where: it stands in `vary`.
    """

    name: str
    settings: dict[tuple[str, ...], Any]
    where: Where

    @property
    def axis(self) -> str:
        """Whose value it is."""
        return str(self.where[0])

    @property
    def listed(self) -> bool:
        """Whether it stands in a list of one setting's values."""
        return isinstance(self.where[-1], int)

    def place(self, *path: str | int) -> Where:
        """Where one of its settings stands in `vary`."""
        return self.where if self.listed else (*self.where, *path)

    def of_each(self) -> dict[str, dict[str, Any]]:
        """What it sets of each step, and of `defaults`, as a file would say it there."""
        found: dict[str, dict[str, Any]] = {}
        for path, value in self.settings.items():
            put(found, path, value)
        return found


@dataclass(frozen=True)
class Axis:
    """Settings that vary together, one value at a time."""

    name: str
    values: tuple[Value, ...]


def axes_of(vary: Mapping[str, Any]) -> list[Axis]:
    """The axes that `vary` says: named variants, or the values of one setting."""
    settings = [name.rpartition(".")[2] for name in vary]
    axes = []
    for name, said in vary.items():
        if isinstance(said, dict):
            values = [Value(each, _flat(parts), (name, each)) for each, parts in said.items()]
        else:
            *_, setting = name.split(".")
            shown = setting if settings.count(setting) == 1 else name
            path = tuple(name.split("."))
            values = [
                Value(f"{shown}={text_of(value)}", {path: value}, (name, index))
                for index, value in enumerate(said)
            ]
        axes.append(Axis(name, tuple(values)))
    return axes


def _flat(parts: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, ...], Any]:
    """Settings by their paths. Those in `defaults.train` are one each: they are merged with the file's."""
    found: dict[tuple[str, ...], Any] = {}
    for target, settings in parts.items():
        for name, value in settings.items():
            if (target, name) == (DEFAULTS, "train") and isinstance(value, dict):
                found |= {(target, name, setting): one for setting, one in value.items()}
            else:
                found[target, name] = value
    return found


def put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a value within mappings, which are made where they are missing."""
    for name in path[:-1]:
        values[name] = inner = dict(values.get(name) or {})
        values = inner
    values[path[-1]] = value


def text_of(value: Any) -> str:
    """A value as a part of a folder's name; of a path the last name.

    >>> [text_of(value) for value in (250, 0.001, None, "models/llava-7b", {"loss": "jsd", "temperature": 2})]
    ['250', '0.001', 'null', 'llava-7b', 'jsd-2']
    """
    if isinstance(value, dict | list | tuple):
        return "-".join(map(text_of, value.values() if isinstance(value, dict) else value))
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")


def mistakes_in(
    vary: Mapping[str, Any], steps: Mapping[str, Callable[..., object]], *, seeded: bool
) -> Iterator[InitErrorDetails]:
    """Whatever is wrong with the axes by themselves, as pydantic says it.

    Args:
        steps: for each step, and for `defaults`, what takes any of its settings and refuses wrong ones.
        seeded: whether the file has `seeds`.
    """
    axes = axes_of(vary)
    names: set[str] = set()
    owners: dict[tuple[str, ...], str] = {}
    for axis in axes:
        if not axis.values:
            yield mistake((axis.name,), "an axis needs at least one value", vary[axis.name])
        if isinstance(vary[axis.name], list) and not _is_a_setting(axis.name):
            yield mistake((axis.name,), _no_setting(axis.name), axis.name)
            continue
        for value in axis.values:
            yield from _of_name(value, names, steps)
            for path in value.settings:
                if owners.setdefault(path, axis.name) != axis.name:
                    yield mistake(value.place(*path), f"axis {owners[path]!r} sets it too", ".".join(path))
                if path[0] != DEFAULTS and path[1] in ("name", "step"):
                    yield mistake(value.place(*path), "what a step is does not vary", value.settings[path])
                elif seeded and path[-1] == "seed":
                    yield mistake(value.place(*path), "`seeds` sets it", value.settings[path])
        yield from _of_settings(axis, vary[axis.name], steps)


def mistake(where: Where, problem: str, value: Any, kind: str = "vary") -> InitErrorDetails:
    """One mistake, in the form in which pydantic takes it."""
    return InitErrorDetails(type=PydanticCustomError(kind, problem), loc=where, input=value)


def _is_a_setting(name: str) -> bool:
    """Whether it is `step.setting`, `defaults.setting` or `defaults.train.setting`."""
    parts = name.split(".")
    return all(parts) and (len(parts) == 2 or (len(parts) == 3 and parts[:2] == [DEFAULTS, "train"]))


def _no_setting(name: str) -> str:
    """Why a list cannot be of that."""
    problem = "a list is of one setting's values, STEP.SETTING: [..]"
    step, setting, *within = name.split(".") if name.count(".") > 1 else (name, "")
    return problem + (f"; what is within {step}.{setting} varies with all of it" if within else "")


def _of_name(value: Value, names: set[str], steps: Collection[str]) -> Iterator[InitErrorDetails]:
    problem = None
    if not _NAME.fullmatch(value.name) or len(value.name) > _MOST:
        problem = f"its name is to be made of letters, digits, -, . and _, {_MOST} at most"
    elif value.name in names:
        problem = "two values have this name, and would have one folder"
    elif re.fullmatch(r"seed-\d+", value.name):
        problem = "the folders of seeds are called so"
    elif value.name in steps:
        problem = "a step has this name too, and both would be folders"
    if problem is not None:
        hint = "; to name it: AXIS: {NAME: {STEP: {SETTING: VALUE}}}" if value.listed else ""
        yield mistake(value.where, problem + hint, value.name)
    names.add(value.name)


def _of_settings(
    axis: Axis, said: Any, steps: Mapping[str, Callable[..., object]]
) -> Iterator[InitErrorDetails]:
    """Steps that there are not, settings that they have not, and values that those cannot have."""
    found: dict[tuple[Where, str], InitErrorDetails] = {}  # a list's setting once, not for each value
    for value in axis.values:
        sets = value.of_each()
        for target in sets if value.listed else said[value.name]:  # of which it may set nothing
            settings = sets.get(target, {})
            for path, kind, problem, given in _refused(target, settings, steps):
                is_unknown = kind in ("vary", "extra_forbidden")
                where = value.where[:1] if is_unknown and value.listed else value.place(target, *path)
                found.setdefault((where, problem), mistake(where, problem, given, kind))
    yield from found.values()


def _refused(
    target: str, settings: dict[str, Any], steps: Mapping[str, Callable[..., object]]
) -> Iterator[tuple[Where, str, str, Any]]:
    if target not in steps:
        near = did_you_mean(nearest(target, steps))
        yield (), "vary", f"there is no step {target!r}{'' if near is None else f' ({near})'}", target
        return
    try:
        steps[target](**settings)
    except ValidationError as error:
        for each in error.errors():
            yield each["loc"], each["type"], each["msg"], each["input"]
