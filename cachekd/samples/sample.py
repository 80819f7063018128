"""One image-text conversation, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image, ImageOps

from cachekd.errors import CachekdError

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Sample:
    """A conversation about images.

    Attributes:
        key: unique in its data set; the cache is looked up by it.
        images: RGB, upright (EXIF rotation applied), in the order of their placeholders.
        messages: for a chat template: `{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}`.
        origin: the file (and member) it came from, for error messages.
    """

    key: str
    images: tuple[Image.Image, ...]
    messages: tuple[dict[str, Any], ...]
    origin: str

    @cached_property
    def content_hash(self) -> bytes:
        """16 bytes over the messages and the pixels: changes with the sample, not with any processor."""
        digest = hashlib.blake2b(json.dumps(self.messages, sort_keys=True).encode(), digest_size=16)
        for image in self.images:
            digest.update(repr(image.size).encode())
            digest.update(image.tobytes())
        return digest.digest()

    @property
    def questions(self) -> list[tuple[dict[str, Any], str]]:
        """Each assistant turn as (the user message before it, the answer's text)."""
        pairs = zip(self.messages, self.messages[1:], strict=False)
        return [(user, message_text(turn)) for user, turn in pairs if turn["role"] == "assistant"]


def message_text(message: dict[str, Any]) -> str:
    """The text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def sample_from_llava(
    key: str, conversations: Any, images: tuple[Image.Image, ...], *, origin: str
) -> Sample:
    """Build a sample from LLaVA-style turns: `[{"from": "human", "value": "<image>\\nWhat?"}, ...]`.

    `<image>` marks where an image stands; where no turn has one, the images come first in the first user
    turn. `{"role", "content"}` with text content is understood as well.

    Raises:
        CachekdError: no image, no assistant turn, an unknown role, an empty answer, or a number of
            placeholders other than the number of images.
    """
    where = f"sample {key!r} in {origin}"
    if not images:
        raise CachekdError(
            "the sample has no image",
            where=where,
            expected="at least one image: Switch-KD distils visual features",
            fix="remove text-only samples from the data set",
        )
    if not isinstance(conversations, list) or not conversations:
        raise CachekdError(
            "the sample has no conversation",
            where=where,
            expected='a list "conversations" of {"from", "value"} turns',
            found=type(conversations).__name__ if not isinstance(conversations, list) else "an empty list",
        )
    messages = [_message(turn, where) for turn in conversations]
    _place_images(messages, len(images), where)
    _check_answers(messages, where)
    return Sample(key, images, tuple(messages), origin)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Apply EXIF rotation, which image processors ignore, and convert to RGB."""
    return ImageOps.exif_transpose(image).convert("RGB")


def _message(turn: Any, where: str) -> dict[str, Any]:
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if role not in _ROLES or not isinstance(text, str):
        raise CachekdError(
            "a turn cannot be read",
            where=where,
            expected=f'{{"from": one of {", ".join(_ROLES)}, "value": text}}',
            found=json.dumps(turn, default=str)[:120],
        )
    content: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if index:
            content.append({"type": "image"})
        # LLaVA writes "<image>\nquestion": the newline belongs to the placeholder, templates set their own.
        piece = piece.strip("\n") if IMAGE_PLACEHOLDER in text else piece
        if piece:
            content.append({"type": "text", "text": piece})
    return {"role": _ROLES[role], "content": content}


def _place_images(messages: list[dict[str, Any]], images: int, where: str) -> None:
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    first_user = next((message for message in messages if message["role"] == "user"), None)
    if placeholders == 0 and first_user is not None:
        first_user["content"][:0] = [{"type": "image"}] * images
    elif placeholders != images:
        raise CachekdError(
            "the number of <image> placeholders differs from the number of images",
            where=where,
            expected=f"{images} placeholder(s), or none at all",
            found=placeholders,
        )


def _check_answers(messages: list[dict[str, Any]], where: str) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise CachekdError(
            "the conversation has no assistant turn, so there is nothing to distil",
            where=where,
            expected='at least one {"from": "gpt"} turn',
            found=f"roles {[message['role'] for message in messages]}",
        )
    for message in answers:
        if not message_text(message).strip() or any(part["type"] == "image" for part in message["content"]):
            raise CachekdError("an assistant turn must be text and not empty", where=where)
