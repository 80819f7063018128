"""`--map module:function`: people's own formats."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cachekd.data.sample import sample_place
from cachekd.errors import BadSample, CachekdError


@dataclass(frozen=True)
class MapFunction:
    """Turns a data set's raw record into one that `sample_from_record` takes.

    Attributes:
        name: `module:function`, for error messages.
        function: takes the raw record as a dict of its own and returns a mapping.
    """

    name: str
    function: Callable[[dict[str, Any]], Any]

    def __call__(self, record: dict[str, Any], key: str, origin: str) -> Mapping[str, Any]:
        """Map one record.

        Raises:
            BadSample: the function raised, or returned no mapping.
        """
        where = f"{self.name} on {sample_place(key, origin)}"
        try:
            mapped = self.function(record)
        except Exception as error:
            raise BadSample(
                "the --map function failed on the sample",
                where=where,
                found=f"{type(error).__name__}: {error}",
            ) from error
        if not isinstance(mapped, Mapping):
            raise BadSample(
                "the --map function returned no record",
                where=where,
                expected='a dict with "image" or "images", and "conversations" or "messages"',
                found=type(mapped).__name__,
            )
        return mapped


def require_map(given: str | None, named: str | None, where: str) -> str | None:
    """The function to read data with, which only the user may name: a cache may come from anybody.

    Args:
        given: the user's `--map`.
        named: what the cache's manifest says that its data were read by.
        where: the cache.

    Raises:
        CachekdError: the manifest names one, and the user does not.
    """
    if given is None and named is not None:
        raise CachekdError(
            "the data were read by a map function, and a cache may not decide what is run here",
            where=where,
            expected="--map",
            found=f"the manifest names {named!r}",
            fix=f"add --map {named} if you know that function",
        )
    return given


def load_map(name: str) -> MapFunction:
    """Import `module:function`, from the current directory as well.

    Raises:
        CachekdError: it is not of that form, cannot be imported, or is no function.
    """
    if sys.path[0] not in ("", os.getcwd()):
        sys.path.insert(0, os.getcwd())  # stays: what the function imports later may lie there too
    expected = "module:function, importable from the current directory or installed"
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise CachekdError("the --map function has no module or no name", found=name, expected=expected)
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # a module runs when it is imported, and may raise anything
        raise CachekdError(
            "the --map function cannot be imported",
            where=name,
            expected=expected,
            found=f"{type(error).__name__}: {error}",
        ) from error
    if not callable(function):
        raise CachekdError(
            "what --map names is no function", where=name, expected=expected, found=type(function).__name__
        )
    return MapFunction(name, function)
