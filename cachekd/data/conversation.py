"""Turns as people write them, LLaVA's or chat messages, to the messages of a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cachekd.data.sample import is_supervised, message_text
from cachekd.data.turn_fields import message_fields, refuse_fields
from cachekd.errors import BadSample

TURN_FIELDS = ("conversations", "messages")
SYSTEM_FIELDS = ("system", "system_prompt")
IMAGE_PLACEHOLDER = "<image>"
# <video>, <|video|>, <|video_pad|>, <video_0>
_MEDIA_PLACEHOLDER = re.compile(r"<\|?(video|audio)(_pad|_?[0-9]+)?\|?>", re.IGNORECASE)
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}

Part = dict[str, Any]


def messages_from_turns(
    turns: Any, images: int, where: str, system: str | None = None
) -> list[dict[str, Any]]:
    """Read a conversation.

    Beside role and content, a turn may say whether it is supervised: `"loss": false`, `"train": false`,
    `"weight": 0` or `"mask": true` make an answer context. Its `name` and `tool_call_id` are the chat
    template's. Fields that would change the turn and cannot be heeded are refused (see `turn_fields`).

    Args:
        turns: a list of `{"from", "value"}` or `{"role", "content"}`, whose content is text with `<image>`
            where an image stands, or a list of `{"type": "text", "text"}` and `{"type": "image"}`. An image
            part's `index` says which of the images it is; if one has an index, all have. Where no turn has
            an image, the images come first in the first user turn. (A mapping of lists, which is what older
            `datasets` make of a list of mappings, is understood too.)
        images: how many there are.
        where: the sample, for error messages.
        system: a text for the first, system turn; None: there is none, or it is among `turns`.

    Returns:
        Messages as in `Sample.messages`. Image parts still have their `index` where they came with one.

    Raises:
        BadSample: no supervised assistant turn, an unknown role, an empty answer, a part or a field that
            cannot be read, video or audio, two system texts, a number of placeholders other than the number
            of images, or an index that is not one of theirs.
    """
    if isinstance(turns, Mapping) and all(isinstance(column, list) for column in turns.values()):
        turns = _rows(turns, where)
    if not isinstance(turns, list) or not turns:
        raise BadSample(
            "the sample has no conversation",
            where=where,
            expected='"conversations", a list of {"from", "value"}, or "messages", of {"role", "content"}',
            found=type(turns).__name__ if not isinstance(turns, list) else "an empty list",
        )
    messages = _with_system([_message(turn, where) for turn in turns], system, where)
    _place_images(messages, images, where)
    _check_answers(messages, where)
    return messages


def first_given(mapping: Mapping[str, Any], *names: str) -> Any:
    """The first of these values that is there and not None: a table fills what a row lacks with None."""
    return next((mapping[name] for name in names if mapping.get(name) is not None), None)


def _rows(columns: Mapping[str, list[Any]], where: str) -> list[dict[str, Any]]:
    if len({len(column) for column in columns.values()}) > 1:
        raise BadSample(
            "the turns' columns are of different lengths",
            where=where,
            found=", ".join(f"{name}: {len(column)}" for name, column in columns.items()),
        )
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _message(turn: Any, where: str) -> dict[str, Any]:
    if isinstance(turn, Mapping):
        refuse_fields(turn, where)
    role = first_given(turn, "from", "role") if isinstance(turn, Mapping) else None
    content = first_given(turn, "value", "content") if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str | list):
        raise BadSample(
            "a turn cannot be read",
            where=where,
            expected=f'{{"from" or "role": one of {", ".join(ROLES)}, "value" or "content": text or parts}}',
            found=json.dumps(turn, default=str)[:120],
        )
    role = ROLES[role]
    parts = _split_placeholders(content) if isinstance(content, str) else _read_parts(content, where)
    if role != "assistant":
        _refuse_media_placeholders(parts, where)
    return {"role": role, "content": parts, **message_fields(turn, role, where)}


def _read_parts(content: list[Any], where: str) -> list[Part]:
    parts: list[Part] = []
    for part in content:
        for piece in _read_part(part, where):
            # Neighbouring texts become one: some templates look at the first part of an answer only.
            if piece["type"] == "text" and parts and parts[-1]["type"] == "text":
                piece = {"type": "text", "text": parts.pop()["text"] + piece["text"]}
            parts.append(piece)
    return parts


def _read_part(part: Any, where: str) -> list[Part]:
    """One part of a list of parts. Only its `type`, `text` and (an image's number) `index` may be set."""
    named = part.items() if isinstance(part, Mapping) else ()
    given = {name: value for name, value in named if value is not None}
    if given.keys() <= {"type", "text", "index"}:
        if given.get("type") == "image" and not given.get("text"):
            return [{name: value for name, value in given.items() if name != "text"}]
        if given.get("type") == "text" and isinstance(given.get("text"), str) and "index" not in given:
            return _split_placeholders(given["text"])
    medium = next((name for name in ("video", "audio") if name in str(given.get("type"))), None)
    raise BadSample(
        f"a part of a turn has {medium}, which is not read" if medium else "a part of a turn cannot be read",
        where=where,
        expected='{"type": "text", "text": ...}, or {"type": "image"} with the image itself in "images"',
        found=json.dumps(part, default=str)[:120],
    )


def _refuse_media_placeholders(parts: list[Part], where: str) -> None:
    found = next(filter(None, (_MEDIA_PLACEHOLDER.search(part.get("text", "")) for part in parts)), None)
    if found:
        raise BadSample(
            f"a turn has {found[0]}, which is not read",
            where=where,
            expected="text and images",
            fix="leave such samples out; where the word itself is meant, write it in another way",
        )


def _with_system(messages: list[dict[str, Any]], system: str | None, where: str) -> list[dict[str, Any]]:
    """Put the record's system text first, unless the conversation has it already."""
    if system is None:
        return messages
    turn = _message({"role": "system", "content": system}, where)
    texts = [message_text(message) for message in messages if message["role"] == "system"]
    if not texts:
        return [turn, *messages]
    if any(text.strip() != message_text(turn).strip() for text in texts):
        raise BadSample(
            "the record's system text is not that of the conversation",
            where=where,
            expected=system[:200],
            found=next(text for text in texts if text.strip() != system.strip())[:200],
            fix="keep one of them",
        )
    return messages


def _split_placeholders(text: str) -> list[Part]:
    content: list[Part] = []
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if index:
            content.append({"type": "image"})
        # LLaVA writes "<image>\nquestion": the newline belongs to the placeholder, templates set their own.
        piece = piece.strip("\n") if IMAGE_PLACEHOLDER in text else piece
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def _place_images(messages: list[dict[str, Any]], images: int, where: str) -> None:
    placeholders = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if any("index" in part for part in placeholders):
        _check_indices(placeholders, images, where)
        return
    first_user = next((message for message in messages if message["role"] == "user"), None)
    if not placeholders and first_user is not None:
        first_user["content"][:0] = [{"type": "image"}] * images
    elif len(placeholders) != images:
        raise BadSample(
            "the number of <image> placeholders differs from the number of images",
            where=where,
            expected=f"{images} placeholder(s), or none at all",
            found=len(placeholders),
        )


def _check_indices(placeholders: list[Part], images: int, where: str) -> None:
    indices = [part.get("index") for part in placeholders]
    if any(type(index) is not int or not 0 <= index < images for index in indices):
        problem = "an image part has no index, or one that is not an image's"
    elif len(set(indices)) < images:
        problem = "an image is named by no part's index"
    else:
        return
    raise BadSample(
        problem,
        where=where,
        expected=f"every placeholder a part with an index, and each of 0 to {images - 1} among them"
        if images
        else "no image parts: the sample has no images",
        found=", ".join("none" if index is None else repr(index) for index in indices)[:120],
        fix="give each image part the number of its image, from 0, or none of them",
    )


def _check_answers(messages: list[dict[str, Any]], where: str) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(map(is_supervised, messages)):
        raise BadSample(
            "the conversation has no assistant turn, so there is nothing to distil"
            if not answers
            else "no assistant turn is supervised, so there is nothing to distil",
            where=where,
            expected='at least one turn that is {"from": "gpt"} or {"role": "assistant"}, and supervised',
            found=f"roles {[message['role'] for message in messages]}",
        )
    for message in answers:
        # Of context too: nothing would prove that the template wrote it.
        if not message_text(message).strip() or any(part["type"] == "image" for part in message["content"]):
            raise BadSample("an assistant turn must be text and not empty", where=where)
