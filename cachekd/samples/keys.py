"""Keys of a table's rows: the cache is looked up by them, so they must be there and differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cachekd.errors import CachekdError


def unique_keys(values: Iterable[Any], where: str, *, row: str = "entry", rows: str = "entries") -> list[str]:
    """The values as keys.

    Args:
        values: one per row, in order.
        where: the file, for error messages.
        row, rows: what a row is called there.

    Raises:
        CachekdError: one is None, appears twice, or is no valid text.
    """
    seen: dict[str, int] = {}
    for position, value in enumerate(values):
        if value is None:
            raise CachekdError('a sample has no "id"', where=f"{row} {position} of {where}")
        key = str(value)
        require_text(key, f"{row} {position} of {where}")
        if key in seen:
            raise CachekdError(
                f"the key {key!r} appears twice",
                where=f"{rows} {seen[key]} and {position} of {where}",
                expected="keys that are unique in the data set: the cache is looked up by them",
                fix="give each sample its own id",
            )
        seen[key] = position
    return list(seen)


def require_text(key: str, where: str) -> None:
    """Refuse a key that cannot be a line of UTF-8 (half of a surrogate pair, a name in another encoding).

    Raises:
        CachekdError: it cannot.
    """
    if "\n" in key:
        raise CachekdError(
            "a sample's key has a line break", where=where, expected="one line of text", found=repr(key)
        )
    try:
        key.encode()
    except UnicodeEncodeError:
        raise CachekdError(
            "a sample's key is not valid text", where=where, expected="UTF-8", found=repr(key)
        ) from None
