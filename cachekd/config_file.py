"""Settings: closed models, read from a YAML file and the command line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, ValidationError, field_validator

from cachekd.errors import CachekdError
from cachekd.ranges import COUNT


class Config(BaseModel):
    """Closed and unchanging: an unknown name is an error, not a silent default. Numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_a_count(cls, value: Any) -> Any:
        """No number is beyond what libraries and the manifest can hold; bytes have a limit of their own."""
        if isinstance(value, int) and not isinstance(value, ByteSize) and value > COUNT:
            raise ValueError(f"input should be at most {COUNT:,}")
        return value


AConfig = TypeVar("AConfig", bound=Config)


def read_config(path: Path | None, model: type[AConfig], options: dict[str, Any]) -> AConfig:
    """A config from a YAML file, with options (those that are not None) overriding it.

    Raises:
        CachekdError: the file is missing or not YAML, or a value is missing, unknown or out of range. Every
            such value is named, unknown names first.
    """
    values = {} if path is None else read_yaml(path)
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return model(**values | given)
    except ValidationError as error:
        # The typo before what is missing because of it.
        errors = sorted(error.errors(), key=lambda each: not _unknown(each))
        raise _refusal(errors, path, given, list(model.model_fields)) from None


def _refusal(errors: list[Any], path: Path | None, given: Iterable[str], known: list[str]) -> CachekdError:
    places = [
        "the command line" if path is None or (e["loc"][:1] and e["loc"][0] in given) else str(path)
        for e in errors
    ]
    problems = [_problem(each, known) for each in errors]
    one = len(errors) == 1
    lines = [
        f"\n  {problem}{_found(each)}, {place}"
        for problem, each, place in zip(problems, errors, places, strict=True)
    ]
    return CachekdError(
        problems[0] if one else f"{len(errors)} settings are wrong:" + "".join(lines),
        where=" and ".join(dict.fromkeys(places)),
        expected=f"one of {', '.join(known)}" if any(map(_unknown, errors)) else None,
        found=errors[0].get("input") if one and errors[0]["type"] != "missing" else None,
    )


def _unknown(error: Any) -> bool:
    return bool(error["type"] == "extra_forbidden")


def _found(error: Any) -> str:
    return "" if error["type"] == "missing" else f": {error.get('input')!r}"


def _problem(error: Any, known: list[str]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if not _unknown(error):
        return f"setting {name!r}: {error['msg'].removeprefix('Value error, ').lower()}"
    near = get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if "training" in known and _is_the_trainers(name):
        hint = " (a field of the Trainer: put it under `training`)"
    return f"unknown setting {name!r}{hint}"


def _is_the_trainers(name: str) -> bool:
    from cachekd.trainer_settings import FIELDS  # importing the Trainer takes seconds

    return name in FIELDS


class _EachOnce(yaml.SafeLoader):
    """YAML of which no mapping has a key twice: the last would win without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in first:
                raise CachekdError(
                    f"{key.value!r} is given twice",
                    where=f"{self.name}, line {line}",
                    expected="every name once",
                    found=f"it is on line {first[key.tag, key.value]} too",
                )
            first[key.tag, key.value] = line
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        CachekdError: the file is missing, not YAML, no mapping, or has a name twice.
    """
    try:
        with path.open() as file:
            values = yaml.load(file, Loader=_EachOnce) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CachekdError("the config cannot be read", where=str(path), found=str(error)) from None
    if not isinstance(values, dict):
        raise CachekdError("the config is not a list of `name: value` lines", where=str(path))
    return values
