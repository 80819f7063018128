"""What of a sample can be known without opening an image: its texts, and how many images it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cachekd.samples.conversation import IMAGE_PLACEHOLDER, SYSTEM_FIELDS, TURN_FIELDS, first_given
from cachekd.samples.image_fields import pictures_of


class Outline(NamedTuple):
    """A sample's turns and its number of images; no image has been opened for it."""

    texts: list[str]
    images: int


def outline_of_record(record: Mapping[str, Any], image_fields: Sequence[str] = ()) -> Outline:
    """Of what `sample_from_record` takes; what the image fields hold is not looked at.

    The texts are those of the turns, of a system text and of tools beside them. What is wrong with a record
    shows when the sample is read; here it has no text.
    """
    contents = _contents(first_given(record, *TURN_FIELDS))
    try:
        texts = [_text(content) for content in contents]
        texts = [text.replace(IMAGE_PLACEHOLDER, "") for text in (*_texts_beside(record, texts), *texts)]
        return Outline(texts, _indexed(contents) or len(pictures_of(record, image_fields)))
    except RecursionError:  # lists in lists, hundreds deep
        return Outline([], 0)


def _contents(turns: Any) -> list[Any]:
    if isinstance(turns, Mapping):  # of lists, as older `datasets` make of a list of mappings
        turns = first_given(turns, "value", "content")
    if not isinstance(turns, list):
        return []
    return [first_given(turn, "value", "content") if isinstance(turn, Mapping) else turn for turn in turns]


def _texts_beside(record: Mapping[str, Any], texts: list[str]) -> Iterator[str]:
    """Of tools, and of a system text that is not among the turns."""
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
    """Of a turn's content, or of one of its parts; an image is its placeholder."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_text(part) for part in content)
    if not isinstance(content, Mapping):
        return ""
    if content.get("type") == "image":
        return IMAGE_PLACEHOLDER
    return _text(first_given(content, "value", "content", "text"))
