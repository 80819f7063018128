"""One image-text conversation, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """A conversation about images.

    Attributes:
        key: unique in its data set; the cache is looked up by it.
        images: RGB, upright (EXIF rotation applied), in the order of their placeholders.
        messages: for a chat template: `{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}`
            and, where it has them, `name` and `tool_call_id`. An answer with `"supervised": False` is
            context; other messages have no such field.
        origin: the file (and member) it came from, for error messages.
        tools: what the assistant may call, for the chat template: JSON values.
    """

    key: str
    images: tuple[Image.Image, ...]
    messages: tuple[dict[str, Any], ...]
    origin: str
    tools: tuple[dict[str, Any], ...] = ()

    @cached_property
    def content_hash(self) -> bytes:
        """16 bytes over messages, tools and pixels: changes with the sample, not with any processor."""
        digest = hashlib.blake2b(json.dumps(self.messages, sort_keys=True).encode(), digest_size=16)
        if self.tools:
            digest.update(json.dumps(self.tools).encode())  # templates write their keys in this order
        for image in self.images:
            digest.update(repr(image.size).encode())
            digest.update(image.tobytes())
        return digest.digest()

    @property
    def where(self) -> str:
        """The sample's place, for error messages."""
        return sample_place(self.key, self.origin)

    @property
    def questions(self) -> list[tuple[tuple[dict[str, Any], ...], str]]:
        """Each supervised answer to a user, as (the messages from the user's on that lead to it, its text).

        Mostly one message leads to it; more where tools are called.
        """
        return [(self.messages[start:end], message_text(self.messages[end])) for start, end in self.asked_at]

    @property
    def asked_at(self) -> list[tuple[int, int]]:
        """Of the same, the places in `messages` of the user's message, of several in a row the first, and of
        the answer.

        What follows an answer at once, without a user or a tool between, answers nobody's question.
        """
        asked, start, before = [], None, ""
        for place, message in enumerate(self.messages):
            if message["role"] == "user":
                start = start if before == "user" else place
            elif is_supervised(message) and start is not None and before != "assistant":
                asked.append((start, place))
            before = message["role"]
        return asked


def sample_place(key: str, origin: str) -> str:
    """How error messages name a sample."""
    return f"sample {key!r} in {origin}"


def is_supervised(message: dict[str, Any]) -> bool:
    """Whether a message is an answer to learn from, not context."""
    return message["role"] == "assistant" and bool(message.get("supervised", True))


def message_text(message: dict[str, Any]) -> str:
    """The text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
