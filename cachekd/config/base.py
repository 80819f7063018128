"""Settings: closed models, read from a YAML file and the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, ValidationError, field_validator

from cachekd.config.fields import COUNT, LATER
from cachekd.errors import CachekdError, clipped


class Config(BaseModel):
    """Closed and unchanging: an unknown name is an error, not a silent default. Numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    FREE: ClassVar[frozenset[str]] = frozenset()  # settings of which nothing that comes out depends

    @field_validator("*")
    @classmethod
    def _is_a_count(cls, value: Any) -> Any:
        """Refuse numbers that libraries and the manifest cannot hold; bytes have a limit of their own."""
        if isinstance(value, int) and not isinstance(value, ByteSize) and value > COUNT:
            raise ValueError(f"input should be at most {COUNT:,}")
        return value

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return the same settings but for those in `update`, which are checked as in a new model.
        (pydantic's own takes any value, and any name.)"""
        said = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**said | dict(update or {}))

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide what comes out, as they stand in JSON."""
        return self.model_dump(mode="json", exclude=set(self.FREE))

    @classmethod
    def later(cls) -> dict[str, Any]:
        """Return the defaults of the settings marked `LATER`. Earlier versions noted none of them, and did
        what the default says."""
        fields = cls.model_fields.items()
        names = {name for name, field in fields if LATER in field.metadata}
        return {name: value for name, value in defaults_of(cls).items() if name in names}

    @classmethod
    def comparable(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Reduce what `deciding` returned, now or in an earlier session, to what has to be equal."""
        return {name: value for name, value in cls.later().items() if name not in cls.FREE} | settings


AConfig = TypeVar("AConfig", bound=Config)


def option_name(setting: str | int) -> str:
    """Return a setting's option as it is typed."""
    return f"--{str(setting).replace('_', '-')}"


def read_config(
    path: Path | None,
    model: type[AConfig],
    options: dict[str, Any],
    typed: Callable[[Any], str] = option_name,
) -> AConfig:
    """Read a config from a YAML file; options that are not None override it.

    Args:
        typed: how a setting is given on the command line.

    Raises:
        CachekdError: the file is missing or not YAML, or a value is missing, unknown or out of range. Every
            such value is named, unknown names first.
    """
    file = None if path is None else YamlFile.read(path)
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return model(**(file.values if file else {}) | given)
    except ValidationError as error:
        mistakes, missing = [], []
        for each in error.errors():
            where = each["loc"]
            place = (
                "the command line" if file is None or (where[:1] and where[0] in given) else file.place(where)
            )
            mistakes.append(Mistake.of(each, place, model))
            # Within a mapping an option of the command line is there, and says too little.
            missing += [typed(where[0])] * (each["type"] == "missing" and len(where) == 1)
        raise refusal(mistakes, f"give {' and '.join(missing)}" if missing else None) from None


@dataclass(frozen=True)
class Mistake:
    """A setting that is wrong.

    Attributes:
        problem: in words.
        place: where the setting stands.
        value: that it has; `NOTHING` where it is missing.
        known: names that it could have, if its name is what is wrong.
    """

    problem: str
    place: str
    value: Any
    known: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, error: Any, place: str, model: type[BaseModel], where: tuple[str | int, ...] | None = None
    ) -> Mistake:
        """Say one of pydantic's errors in our words.

        Args:
            model: the setting is one of it.
            where: in it; by default as the error has it.
        """
        unknown = error["type"] == "extra_forbidden"
        where, known = _place(model, error["loc"] if where is None else where, unknown=unknown)
        name = ".".join(map(str, where))
        value = NOTHING if error["type"] == "missing" else error.get("input")
        if where[-1:] == ("[key]",):  # YAML reads 1, on and no as such
            name = ".".join(map(str, where[:-2]))
            return cls(f"setting {name!r}: a name is a text: write it in quotes", place, value)
        if not unknown:
            text = _TEXTS.get(error["type"], error["msg"]).removeprefix("Value error, ")
            return cls(f"setting {name!r}: {text[0].lower()}{text[1:]}", place, value)
        return cls(f"unknown setting {name!r}{_hint(str(where[-1]), known)}", place, value, known)


NOTHING = object()
# pydantic's words for what a file has are Python's.
_TEXTS = {
    "dict_type": "a mapping is needed, {NAME: VALUE}; one of nothing is {}",
    "list_type": "a list is needed, [VALUE, VALUE]",
}


def refusal(mistakes: list[Mistake], fix: str | None = None) -> CachekdError:
    """Return one error for all mistakes. Several have a line each, and a typo stands before what is missing
    because of it.

    Args:
        fix: for what is missing.
    """
    mistakes = sorted(mistakes, key=lambda mistake: not mistake.known)
    first = mistakes[0]
    if not any(mistake.value is NOTHING for mistake in mistakes):
        fix = None
    lists = {mistake.known for mistake in mistakes if mistake.known}  # of one place in a file, or several
    known = f"one of {', '.join(lists.pop())}" if len(lists) == 1 else None
    if len(mistakes) == 1:
        found = None if first.value is NOTHING else clipped(str(first.value))
        return CachekdError(first.problem, where=first.place, expected=known, found=found, fix=fix)
    lines = [
        f"\n  {each.problem}{'' if each.value is NOTHING else f': {clipped(repr(each.value))}'}, {each.place}"
        for each in mistakes
    ]
    return CachekdError(f"{len(mistakes)} settings are wrong:{''.join(lines)}", expected=known, fix=fix)


def _place(
    model: type[BaseModel], where: tuple[str | int, ...], *, unknown: bool
) -> tuple[tuple[str | int, ...], tuple[str, ...]]:
    """Read where pydantic found an error.

    Args:
        where: names, places in lists, and tags: of what may be of several kinds, which it was taken for.
        unknown: the last of it is the name of no setting.

    Returns:
        it without tags; and the names of all settings that could stand there, which may be within another.
    """
    names: list[str | int] = []
    here = [model]  # of which one says what may stand here; none says that of a plain mapping
    for number, part in enumerate(where, 1):
        last = number == len(where)
        if last and unknown:
            return (*names, part), tuple(here[0].model_fields) if here else ()
        field = here[0].model_fields.get(str(part)) if here else None
        if field is None and here and isinstance(part, str):
            tagged = [one for one in here if any(part == f.default for f in one.model_fields.values())]
            here = tagged or here
            continue
        names.append(part)
        here = here if isinstance(part, int) else [] if field is None else _models_in(field.annotation)
    return tuple(names), ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Find the models of a setting that is made of settings."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _hint(name: str, known: tuple[str, ...]) -> str:
    """Say what may have been meant. A slip is told before the Trainer is imported, which takes seconds."""
    near = get_close_matches(name, known, 1)
    slip = get_close_matches(name, known, 1, cutoff=0.85)
    if "training" in known and not slip and _is_the_trainers(name):
        return " (a field of the Trainer: put it under `training`)"
    return f" (did you mean {near[0]!r}?)" if near else ""


def _is_the_trainers(name: str) -> bool:
    from transformers import TrainingArguments  # takes seconds

    return name in TrainingArguments.__dataclass_fields__


@dataclass(frozen=True)
class YamlFile:
    """A mapping in a YAML file, and where in the file its parts stand.

    Attributes:
        path: of the file.
        values: the mapping.
        node: the same, with lines, as yaml has it.
        base: another file, whose are those of the values that `node` lacks.
    """

    path: Path
    values: dict[str, Any]
    node: yaml.Node | None
    base: YamlFile | None = None

    @classmethod
    def read(cls, path: Path) -> YamlFile:
        """Read the file.

        Raises:
            CachekdError: the file is missing, not YAML, no mapping, or has a name twice.
        """
        try:
            with path.open() as file:
                loader = _EachOnce(file)
                try:
                    node = loader.get_single_node()
                    values = {} if node is None else loader.construct_document(node) or {}
                finally:
                    loader.dispose()
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise CachekdError("the config cannot be read", where=str(path), found=str(error)) from None
        if not isinstance(values, dict):
            raise CachekdError("the config is not a list of `name: value` lines", where=str(path))
        return cls(path, values, node)

    def over(self, base: YamlFile) -> YamlFile:
        """Add another file's values, but for those of which this file has its own."""
        return replace(self, values=base.values | self.values, base=base)

    def place(self, where: tuple[str | int, ...]) -> str:
        """Return file and line of a setting, or of the nearest one that it would stand in.

        Args:
            where: names and places in lists, as in pydantic's errors; what is none of the file's is passed
                over, such as the tag of a union.
        """
        if self.base is not None and where and where[0] in self.base.values.keys() - _names(self.node):
            return self.base.place(where)
        node, line = self.node, None
        for part in where:
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                node = node.value[part]
                line = node.start_mark.line + 1
            elif isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == part:
                        node, line = value, key.start_mark.line + 1
                        break
        return str(self.path) if line is None else f"{self.path}, line {line}"


def _names(node: yaml.Node | None) -> set[str]:
    return {key.value for key, _ in node.value} if isinstance(node, yaml.MappingNode) else set()


class _EachOnce(yaml.SafeLoader):
    """Loads YAML whose mappings have each key once: of two, the last would win without a word."""

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


def defaults_of(model: type[Config]) -> dict[str, Any]:
    """Return the defaults of a model's settings, as they stand in JSON."""
    return model.model_construct().model_dump(mode="json", warnings=False)
