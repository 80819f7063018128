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
    def where(self) -> str:
        """The sample's place, for error messages."""
        return sample_place(self.key, self.origin)

    @property
    def questions(self) -> list[tuple[dict[str, Any], str]]:
        """Each assistant turn as (the user message before it, the answer's text)."""
        pairs = zip(self.messages, self.messages[1:], strict=False)
        return [(user, message_text(turn)) for user, turn in pairs if turn["role"] == "assistant"]


def sample_place(key: str, origin: str) -> str:
    """How error messages name a sample."""
    return f"sample {key!r} in {origin}"


def message_text(message: dict[str, Any]) -> str:
    """The text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
