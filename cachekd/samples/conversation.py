"""Turns as people write them, LLaVA's or chat messages, to the messages of a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cachekd.errors import BadSample
from cachekd.samples.sample import message_text

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

Part = dict[str, str]


def messages_from_turns(turns: Any, images: int, where: str) -> list[dict[str, Any]]:
    """Read a conversation.

    Args:
        turns: a list of `{"from", "value"}` or `{"role", "content"}`, whose content is text with `<image>`
            where an image stands, or a list of `{"type": "text", "text"}` and `{"type": "image"}`. Where no
            turn has an image, the images come first in the first user turn. (A mapping of lists, which is
            what older `datasets` make of a list of mappings, is understood too.)
        images: how many there are.
        where: the sample, for error messages.

    Returns:
        Messages as in `Sample.messages`.

    Raises:
        BadSample: no assistant turn, an unknown role, an empty answer, a part that cannot be read, or a
            number of placeholders other than the number of images.
    """
    if isinstance(turns, Mapping) and all(isinstance(column, list) for column in turns.values()):
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list) or not turns:
        raise BadSample(
            "the sample has no conversation",
            where=where,
            expected='"conversations", a list of {"from", "value"}, or "messages", of {"role", "content"}',
            found=type(turns).__name__ if not isinstance(turns, list) else "an empty list",
        )
    messages = [_message(turn, where) for turn in turns]
    _place_images(messages, images, where)
    _check_answers(messages, where)
    return messages


def first_given(mapping: Mapping[str, Any], *names: str) -> Any:
    """The first of these values that is there and not None: a table fills what a row lacks with None."""
    return next((mapping[name] for name in names if mapping.get(name) is not None), None)


def _message(turn: Any, where: str) -> dict[str, Any]:
    role = first_given(turn, "from", "role") if isinstance(turn, Mapping) else None
    content = first_given(turn, "value", "content") if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str | list):
        raise BadSample(
            "a turn cannot be read",
            where=where,
            expected=f'{{"from" or "role": one of {", ".join(_ROLES)}, "value" or "content": text or parts}}',
            found=json.dumps(turn, default=str)[:120],
        )
    if isinstance(content, str):
        return {"role": _ROLES[role], "content": _split_placeholders(content)}
    parts: list[Part] = []
    for part in content:
        for piece in _read_part(part, where):
            # Neighbouring texts become one: some templates look at the first part of an answer only.
            if piece["type"] == "text" and parts and parts[-1]["type"] == "text":
                piece = {"type": "text", "text": parts.pop()["text"] + piece["text"]}
            parts.append(piece)
    return {"role": _ROLES[role], "content": parts}


def _read_part(part: Any, where: str) -> list[Part]:
    """One part of a list of parts. Only its `type`, `text` and (an image's number) `index` may be set."""
    named = part.items() if isinstance(part, Mapping) else ()
    given = {name: value for name, value in named if value is not None}
    if given.keys() <= {"type", "text", "index"}:
        if given.get("type") == "image" and not given.get("text"):
            return [{"type": "image"}]
        if given.get("type") == "text" and isinstance(given.get("text"), str):
            return _split_placeholders(given["text"])
    raise BadSample(
        "a part of a turn cannot be read",
        where=where,
        expected='{"type": "text", "text": ...}, or {"type": "image"} with the image itself in "images"',
        found=json.dumps(part, default=str)[:120],
    )


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
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    first_user = next((message for message in messages if message["role"] == "user"), None)
    if placeholders == 0 and first_user is not None:
        first_user["content"][:0] = [{"type": "image"}] * images
    elif placeholders != images:
        raise BadSample(
            "the number of <image> placeholders differs from the number of images",
            where=where,
            expected=f"{images} placeholder(s), or none at all",
            found=placeholders,
        )


def _check_answers(messages: list[dict[str, Any]], where: str) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadSample(
            "the conversation has no assistant turn, so there is nothing to distil",
            where=where,
            expected='at least one turn that is {"from": "gpt"} or {"role": "assistant"}',
            found=f"roles {[message['role'] for message in messages]}",
        )
    for message in answers:
        if not message_text(message).strip() or any(part["type"] == "image" for part in message["content"]):
            raise BadSample("an assistant turn must be text and not empty", where=where)
