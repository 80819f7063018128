"""The options of a data set, for every command that reads one: made from `DataOptions`, where they stand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from cachekd.data_options import DataOptions
from cachekd.errors import CachekdError

PANEL = "Data"
_OURS = "data_"  # before their names as parameters: a command may have a `key` of its own
Given = dict[str, Any]  # of a command: the options of its data that were given, by name


def takes_data(*, required: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options in the place of its parameter `data: Given`.

    >>> @takes_data()
    ... def bind_command(cache: str, data: Given) -> None: ...
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.name != "data"]
        made = [
            _parameter(name, field, required=required and name == "data")
            for name, field in DataOptions.model_fields.items()
        ]

        @wraps(command)
        def with_data(**given: Any) -> None:
            data = {name: given.pop(_OURS + name) for name in DataOptions.model_fields}
            command(**given, data={name: value for name, value in data.items() if value not in (None, [])})

        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        with_data.__signature__ = own.replace(parameters=[*keyword, *made])  # type: ignore[attr-defined]
        return with_data

    return decorate


def read_data(given: Given) -> DataOptions:
    """What was given, checked.

    Raises:
        CachekdError: a value is missing or out of range.
    """
    from cachekd.config_file import read_config

    return read_config(None, DataOptions, given)


def read_optional(given: Given) -> DataOptions | None:
    """The same; None where no option of data was given at all.

    Raises:
        CachekdError: there are some without --data.
    """
    if given and "data" not in given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise CachekdError(f"{options} without data", expected="--data", fix="add --data, or leave them out")
    return read_data(given) if given else None


def _parameter(name: str, field: FieldInfo, *, required: bool) -> inspect.Parameter:
    """None stands for what was not given: a file of settings may say it."""
    default = "" if field.default in (None, ()) or field.is_required() else f" Default: {field.default}."
    text = str(field.description)
    option = typer.Option(
        f"--{name.replace('_', '-')}", help=f"{text[0].upper()}{text[1:]}.{default}", rich_help_panel=PANEL
    )
    kind = list[str] if field.annotation == tuple[str, ...] else _scalar(field.annotation)
    return inspect.Parameter(
        _OURS + name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[kind if required else kind | None, option],
    )


def _scalar(annotation: Any) -> Any:
    """Without `| None`, and without what pydantic does with it: `DataOptions` is made of it."""
    inner = [part for part in get_args(annotation) if part is not type(None)]
    plain = inner[0] if len(inner) == 1 else annotation
    return get_args(plain)[0] if get_origin(plain) is Annotated else plain
