"""Settings from a YAML file and the command line, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from cachekd.config import Config
from cachekd.errors import CachekdError

AConfig = TypeVar("AConfig", bound=Config)


def read_config(path: Path | None, model: type[AConfig], options: dict[str, Any]) -> AConfig:
    """A config from a YAML file, with options (those that are not None) overriding it.

    Raises:
        CachekdError: the file is missing or not YAML, or a value is missing, unknown or out of range.
    """
    values = {} if path is None else read_yaml(path)
    values |= {name: value for name, value in options.items() if value is not None}
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        names = ", ".join(model.model_fields)
        unknown = first["type"] == "extra_forbidden"
        raise CachekdError(
            f"unknown setting {name!r}" if unknown else f"setting {name!r}: {first['msg'].lower()}",
            where=str(path) if path is not None and name not in options else "the command line",
            expected=f"one of {names}" if unknown else None,
            found=None if first["type"] == "missing" else first.get("input"),
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        CachekdError: the file is missing, not YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CachekdError("the config cannot be read", where=str(path), found=str(error)) from None
    if not isinstance(values, dict):
        raise CachekdError("the config is not a list of `name: value` lines", where=str(path))
    return values
