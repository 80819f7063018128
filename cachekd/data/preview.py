"""What a record tells of a sample without opening a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from cachekd.data.conversation import IMAGE_PLACEHOLDER, ROLES, SYSTEM_FIELDS, TURN_FIELDS, first_given
from cachekd.data.image_fields import pictures_of
from cachekd.data.sample import Preview


def preview_of_record(record: Mapping[str, Any], image_fields: Sequence[str] = ()) -> Preview:
    """Preview what `sample_from_record` takes; what the image fields hold is not looked at.

    The texts are those of the turns, of a system text and of tools beside them. What is wrong with a record
    shows when the sample is read; here it has no text.
    """
    turns = _turns(first_given(record, *TURN_FIELDS))
    contents = [content for _, content in turns]
    try:
        texts = [_text(content).replace(IMAGE_PLACEHOLDER, "") for content in contents]
        answered = _answered([ROLES.get(str(role)) for role, _ in turns], texts)
        images = _indexed(contents) or len(pictures_of(record, image_fields))
        return Preview([*_texts_beside(record, texts), *texts], images, answered)
    except RecursionError:  # lists in lists, hundreds deep
        return Preview([], 0)


def _turns(turns: Any) -> list[tuple[Any, Any]]:
    """Tell for each turn who says it and what."""
    if isinstance(turns, Mapping):  # of lists, as older `datasets` make of a list of mappings
        contents, roles = first_given(turns, "value", "content"), first_given(turns, "from", "role")
        if not isinstance(contents, list):
            return []
        known = roles[: len(contents)] if isinstance(roles, list) else []
        return list(zip_longest(known, contents))
    if not isinstance(turns, list):
        return []
    return [
        (first_given(turn, "from", "role"), first_given(turn, "value", "content"))
        if isinstance(turn, Mapping)
        else (None, turn)
        for turn in turns
    ]


def _answered(roles: list[str | None], texts: list[str]) -> tuple[tuple[str, str], ...]:
    """Pair questions and answers as `Sample.questions` does, unsupervised answers too."""
    found, question, before = [], None, None
    for role, text in zip(roles, texts, strict=True):
        if role == "user":
            question = f"{question} {text}" if before == "user" else text
        elif role == "assistant" and question is not None and before != "assistant":
            found.append((question, text))
        before = role
    return tuple(found)


def _texts_beside(record: Mapping[str, Any], texts: list[str]) -> Iterator[str]:
    """Yield the text of tools, and a system text that is not among the turns."""
    if tools := record.get("tools"):
        yield str(tools)
    system = first_given(record, *SYSTEM_FIELDS)
    if isinstance(system, str) and system and system not in texts:
        yield system


def _indexed(contents: list[Any]) -> int:
    """How many parts say which image they are: an image may stand in several places."""
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(
        isinstance(part, Mapping) and part.get("type") == "image" and part.get("index") is not None
        for part in parts
    )


def _text(content: Any) -> str:
    """Read the text of a turn's content, or of a part of it; an image is its placeholder."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_text(part) for part in content)
    if not isinstance(content, Mapping):
        return ""
    if content.get("type") == "image":
        return IMAGE_PLACEHOLDER
    return _text(first_given(content, "value", "content", "text"))
