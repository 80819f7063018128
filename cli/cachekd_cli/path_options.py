"""Paths among a command's options and arguments: the shell leaves the `~` of `--out=~/x` as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Annotated, Any, get_args, get_type_hints

from typer.models import ArgumentInfo, ParameterInfo

from cachekd.errors import CachekdError
from cachekd.paths import expanded, takes_path


def expands_paths(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every parameter of type `Path` or `PathOrName` expanded before it runs."""
    signature = inspect.signature(command, eval_str=True)
    types = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    paths = {name: _shown(name, kind) for name, kind in types.items() if takes_path(kind)}

    @wraps(command)
    def with_paths(**given: Any) -> None:
        for name, shown in paths.items():
            try:
                given[name] = expanded(given[name])
            except ValueError as error:
                raise CachekdError(str(error), where=shown, found=str(given[name])) from None
        command(**given)

    # Typer knows `str` and `list[str]`, not what they are made of in `PathOrName`.
    plain = get_type_hints(SimpleNamespace(__annotations__=types))
    parameters = [
        parameter.replace(annotation=Annotated[plain[name], *_options(types[name])])
        for name, parameter in signature.parameters.items()
    ]
    with_paths.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_paths


def _options(annotation: Any) -> list[ParameterInfo]:
    return [part for part in get_args(annotation) if isinstance(part, ParameterInfo)]


def _shown(name: str, annotation: Any) -> str:
    """As it is typed; those of a data set have `data_` before their names."""
    if any(isinstance(option, ArgumentInfo) for option in _options(annotation)):
        return name.upper()
    return f"--{name.removeprefix('data_').replace('_', '-')}"
