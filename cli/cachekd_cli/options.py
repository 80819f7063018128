"""Options: made from the models of `cachekd.config`, and those that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from pathlib import Path
from types import MappingProxyType, NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from typer.models import ArgumentInfo, ParameterInfo

from cachekd.config import Config, DataOptions, read_config
from cachekd.config.base import option_name
from cachekd.config.losses import Loss
from cachekd.errors import CachekdError
from cachekd.paths import expanded, takes_path

Command = Callable[..., None]

CacheFolder = Annotated[Path, typer.Argument(help="The cache's folder.")]
NewFolder = Annotated[Path, typer.Argument(help="A new or empty folder.")]
Binding = Annotated[
    Path | None, typer.Option(help="What `cachekd bind` wrote, where the data have other keys.")
]
TopK = Annotated[int | None, typer.Option(help="Most logprobs per token. Default: all that are kept.")]
Timeout = Annotated[
    float,
    typer.Option(
        min=1,
        metavar="SECONDS",
        help="Give up when no byte came or went for so long; what is finished stays.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, on stdout.")]


def takes(
    model: type[Config],
    *,
    arguments: Collection[str] = (),
    named: Mapping[str, str] = MappingProxyType({}),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Command], Command]:
    """Give a command the fields of a model as options, in the place of its parameter of that type.

    Name, help, default and choices are the field's, and the model checks what is given. A command whose
    settings are more than a data set's takes `--config` too, a file that options override; mappings stand in
    that file alone. A parameter that may be None is None where no option of it was given.

    Args:
        arguments: fields that are given without a name.
        named: by field, its option where that has another name: one for each time that it is given.
        environment: by field, the variable that says what no option does.

    >>> @takes(DumpConfig)
    ... def dump_command(config: DumpConfig, estimate: bool = False) -> None: ...
    """

    def typed(name: str) -> str:
        return name.upper() if name in arguments else named.get(name, option_name(name))

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True)
        target = next(p for p in own.parameters.values() if model in _types(p.annotation))
        file = [] if model is DataOptions else [_file_option(target.name, model)]
        made = {
            name: _argument(name, field)
            if name in arguments
            else _option(name, field, typed(name), environment.get(name))
            for name, field in model.model_fields.items()
            if option_type(field) is not None
        }

        @wraps(command)
        def with_settings(**given: Any) -> None:
            path = given.pop(target.name) if file else None
            said = {name: given.pop(name) for name in made}
            said = {name: value for name, value in said.items() if value is not None and value != []}
            read = _read_optional if NoneType in _types(target.annotation) else read_config
            command(**given, **{target.name: read(path, model, said, typed)})

        parameters = [*file, *made.values(), *(p for p in own.parameters.values() if p is not target)]
        inherited = model.model_fields.keys() - inspect.get_annotations(model).keys()
        # Those of data have a panel of their own; others that models share stand behind a model's own.
        parameters.sort(key=lambda p: (p.name in DataOptions.model_fields, p.name in inherited))
        with_settings.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        )
        return with_settings

    return decorate


def option_type(field: FieldInfo) -> Any:
    """The type that typer gives a field's option; the model checks all else. None where it is a mapping."""
    kinds = {_typer_type(kind) for kind in _types(field.annotation) if kind is not NoneType}
    return kinds.pop() if len(kinds) == 1 else str


def choices(annotation: Any) -> tuple[str, ...]:
    """The values from which a setting is chosen, alone or several at once; none where it is free."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(dict.fromkeys(one for part in get_args(annotation) for one in choices(part)))


def expands_paths(command: Command) -> Command:
    """Expand every parameter of type `Path` or `PathOrName` before the command runs: the shell leaves the `~`
    of `--out=~/x` as it is."""
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
        parameter.replace(annotation=Annotated[plain[name], *_infos(types[name])])
        for name, parameter in signature.parameters.items()
    ]
    with_paths.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_paths


def _read_optional(
    file: None, model: type[Config], said: dict[str, Any], typed: Callable[[Any], str]
) -> Config | None:
    """Read data that need not be given; None where no option of theirs was.

    Raises:
        CachekdError: there are some without --data, or a value is out of range.
    """
    if said and "data" not in said:
        options = ", ".join(map(typed, said))
        raise CachekdError(f"{options} without data", expected="--data", fix="add --data, or leave them out")
    return read_config(file, model, said, typed) if said else None


def _file_option(name: str, model: type[Config]) -> inspect.Parameter:
    text = "YAML with any of these settings; options override it."
    fields = model.model_fields.items()
    alone = [f"{name} ({field.description})" for name, field in fields if option_type(field) is None]
    if alone:
        text += f" In it alone stand mappings: {', '.join(alone)}."
    return _optional(name, Path, typer.Option("--config", help=text))


def _argument(name: str, field: FieldInfo) -> inspect.Parameter:
    return _optional(name, option_type(field), typer.Argument(help=_help(field), show_default=False))


def _option(name: str, field: FieldInfo, option: str, variable: str | None) -> inspect.Parameter:
    kind = option_type(field)
    if kind is bool:
        option += f"/{option_name(f'no_{name}')}" * field.default
    panel = "Data" if name in DataOptions.model_fields else None
    info = typer.Option(
        option, help=_help(field), envvar=variable, rich_help_panel=panel, autocompletion=_offers(field)
    )
    return _optional(name, kind, info)


def _offers(field: FieldInfo) -> Callable[[str], list[str]]:
    """What a shell completes a value with; where there are no choices it goes on with files."""
    known = choices(field.annotation)
    return lambda incomplete: [choice for choice in known if choice.startswith(incomplete)]


def _optional(name: str, kind: Any, info: ParameterInfo) -> inspect.Parameter:
    """Make a parameter. Its default is None, which stands for what was not given: a file may say it."""
    annotation = Annotated[kind | None, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: FieldInfo) -> str:
    """Say what it is, its choices and its default, as they are typed."""
    known, value, text = choices(field.annotation), field.default, str(field.description)
    told = f"{text[0].upper()}{text[1:]}." + (f" Choices: {', '.join(known)}." if known else "")
    if field.is_required():
        return f"{told} Required."
    if value is None or value is False or value in ((), []):
        return told
    if isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, tuple):
        value = ",".join(value)
    return f"{told} Default: {'on' if value is True else value}."


def _typer_type(kind: Any) -> Any:
    if kind in (bool, int, float, Path):
        return kind
    shape = get_origin(kind) or kind
    if shape in (list, tuple):
        return list[str]
    # Other data are said by their name, and so is a loss.
    return str if shape is Literal or issubclass(shape, str | ByteSize | DataOptions | Loss) else None


def _types(annotation: Any) -> list[Any]:
    """The types that a value may have, without what pydantic or typer adds to them."""
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _types(part)]
    return [annotation]


def _infos(annotation: Any) -> list[ParameterInfo]:
    return [part for part in get_args(annotation) if isinstance(part, ParameterInfo)]


def _shown(name: str, annotation: Any) -> str:
    if any(isinstance(info, ArgumentInfo) for info in _infos(annotation)):
        return name.upper()
    return option_name(name)
