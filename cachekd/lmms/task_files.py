"""The task files of lmms-eval, read without lmms-eval: which there are, and what each of them asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cachekd.errors import CachekdError, did_you_mean, first_line, nearest

_NAMED = re.compile(r"^\s*(?:task|group|tag)\s*:", re.MULTILINE)  # others are parts that tasks include
# pyyaml's C loader is some ten times as fast as its other one; not every build of it has one.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Function:
    """A Python function that a task file names, as in `!function utils.pope_doc_to_text`.

    Attributes:
        name: of the function.
        file: that it is in, beside the task's; it may lie elsewhere, and then this is no file.
    """

    name: str
    file: Path


@dataclass(frozen=True)
class TaskFile:
    """One task, group or tag.

    Attributes:
        name: that `--benchmarks` calls it by.
        path: of its YAML file; of a tag, of the first task that has it.
        config: the file, with the files that it includes. Functions are `Function`s.
        members: of a group or tag, the names of what it stands for; empty for a task.
    """

    name: str
    path: Path
    config: dict[str, Any]
    members: tuple[str, ...] = ()


class TaskFiles:
    """The tasks in some folders, by their names.

    Args:
        folders: each with all that is below it; of two tasks with one name the first folder's counts.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    @cached_property
    def by_name(self) -> dict[str, TaskFile]:
        """Every task, group and tag.

        Raises:
            CachekdError: a file is no YAML, or includes one that is not there.
        """
        found: dict[str, TaskFile] = {}
        tags: dict[str, list[TaskFile]] = {}
        for path in (path for folder in self.folders for path in sorted(folder.rglob("*.yaml"))):
            one = _task_file(path)
            if one is None or one.name in found:
                continue
            found[one.name] = one
            for tag in () if one.members else _texts(one.config.get("tag", one.config.get("group"))):
                tags.setdefault(tag, []).append(one)
        for tag, tasks in tags.items():
            members = tuple(task.name for task in tasks)
            found.setdefault(tag, TaskFile(tag, tasks[0].path, {}, members))
        return found

    def tasks(self, names: Iterable[str]) -> list[TaskFile]:
        """The tasks that are named, each once, in that order. A group or a tag stands for its tasks.

        Raises:
            CachekdError: there is no such task.
        """
        found: dict[str, TaskFile] = {}
        for name in names:
            for one in self._within(name, seen=frozenset()):
                found.setdefault(one.name, one)
        return list(found.values())

    def _within(self, name: str, seen: frozenset[str]) -> Iterator[TaskFile]:
        one = self.by_name.get(name)
        if one is None:
            raise CachekdError(
                "there is no such benchmark",
                where="setting 'benchmarks'",
                expected="the name of a task of lmms-eval, or of one in --tasks-dir",
                found=name,
                fix=did_you_mean(nearest(name, self.by_name))
                or "`lmms-eval tasks list` shows all of lmms-eval's",
            )
        if not one.members:
            yield one
        for member in one.members:
            if member not in seen:
                yield from self._within(member, seen | {name})


def _task_file(path: Path) -> TaskFile | None:
    """What a YAML file declares; None for one that only others include."""
    try:
        named = _NAMED.search(path.read_text("utf-8", errors="replace"))
    except OSError as error:
        raise _unreadable(path, first_line(error)) from None
    if named is None:
        return None
    config = _read(path)
    task, group = config.get("task"), config.get("group")
    if isinstance(task, str):
        return TaskFile(task, path, config)
    if isinstance(task, list) and isinstance(group, str):
        return TaskFile(group, path, config, tuple(map(_member, task)))
    return None


def _member(task: Any) -> str:
    """A group names its tasks, or says more about them."""
    return str(task["task"] if isinstance(task, dict) and "task" in task else task)


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file over those that it includes.

    Args:
        below: the files that include it.

    Raises:
        CachekdError: it cannot be read, or includes itself.
    """
    if path.resolve() in below:
        raise _unreadable(path, "it includes itself, or a file that does")
    try:
        values = yaml.load(path.read_text("utf-8"), _loader_beside(path)) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(path, first_line(error)) from None
    if not isinstance(values, dict):
        return {}
    config: dict[str, Any] = {}
    for included in reversed(_texts(values.pop("include", None))):
        whole = Path(included)
        config |= _read(whole if whole.is_file() else path.parent / included, (*below, path.resolve()))
    return config | values


def _unreadable(path: Path, found: str) -> CachekdError:
    return CachekdError("a task file cannot be read", where=str(path), found=found, fix="mend or remove it")


def _loader_beside(path: Path) -> Any:
    """A loader that keeps functions by their names: what is only looked at does not run."""

    class Loader(_Loader):
        pass

    def function(_loader: Any, node: Any) -> Function:
        *module, name = str(node.value).split(".")
        return Function(name, path.parent.joinpath(*module).with_suffix(".py"))

    Loader.add_constructor("!function", function)
    return Loader


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def functions_in(value: Any) -> Iterator[Function]:
    """Every function that a part of a task's file names, at any depth."""
    if isinstance(value, Function):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from functions_in(part)
