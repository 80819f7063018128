"""Text of unknown origin, made safe to show in a terminal."""

from __future__ import annotations

_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def visible(text: str) -> str:
    """Every character that would not show, or would do something, by a sign or its escape.

    A key or a token may hold escape sequences that clear the screen, or marks that turn the reading order.
    """
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else _escaped(c)) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
