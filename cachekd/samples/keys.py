"""Keys of a data set's samples: the cache is looked up by them, so they must be there and differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cachekd.errors import CachekdError


class Keys(NamedTuple):
    """Keys in the order of the data, all different.

    Attributes:
        repeated: how many of them had a key that came before, and have `#2`, `#3`, ... behind it now.
    """

    keys: list[str]
    repeated: int


def unique_keys(values: Sequence[Any], where: str, *, row: str = "entry") -> Keys:
    """The values as keys. One that is None, empty or NaN becomes the row's number; the second of two equal
    ones becomes `key#2`, the third `key#3`, in the order of the data.

    Args:
        values: one per row, in order.
        where: the file, for error messages.
        row: what a row is called there.

    Raises:
        CachekdError: one is neither text nor a number, or no valid text.
    """
    wished = [_key(value, position, where, row) for position, value in enumerate(values)]
    taken = set(wished)
    times: dict[str, int] = {}
    keys = []
    for key in wished:
        number = times.get(key, 0) + 1
        # A key that the data themselves write so keeps it.
        while number > 1 and f"{key}#{number}" in taken:
            number += 1
        times[key] = number
        keys.append(key if number == 1 else f"{key}#{number}")
    return Keys(keys, len(wished) - len(taken))


def _key(value: Any, position: int, where: str, row: str) -> str:
    if value is None or value == "" or value != value:  # NaN, which tables write for nothing
        return f"{position:08d}"
    if not isinstance(value, str | int | float):
        raise CachekdError(
            "a sample's key is neither text nor a number",
            where=f"{row} {position} of {where}",
            found=f"{type(value).__name__} {str(value)[:100]}",
            fix="--key FIELD takes another field, --key index the row's number",
        )
    key = str(value)
    require_text(key, f"{row} {position} of {where}")
    return key


def require_text(key: str, where: str) -> None:
    """Refuse a key that cannot be a line of UTF-8 (half of a surrogate pair, a name in another encoding).

    Raises:
        CachekdError: it cannot.
    """
    if "\n" in key:
        raise CachekdError(
            "a sample's key has a line break", where=where, expected="one line of text", found=repr(key)[:200]
        )
    try:
        key.encode()
    except UnicodeEncodeError:
        raise CachekdError(
            "a sample's key is not valid text", where=where, expected="UTF-8", found=repr(key)[:200]
        ) from None
