"""A sample, its key, and what every data set is to the rest of cachekd."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from cachekd.errors import CachekdError


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
        """Where these stand in `messages`: the user's message, of several in a row the first, and the answer.

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
    """Name a sample for error messages."""
    return f"sample {key!r} in {origin}"


def is_supervised(message: dict[str, Any]) -> bool:
    """Whether a message is an answer to learn from, not context."""
    return message["role"] == "assistant" and bool(message.get("supervised", True))


def message_text(message: dict[str, Any]) -> str:
    """The text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


@dataclass(frozen=True)
class DataNotes:
    """What was noticed of a whole data set when it was opened, before any limit.

    Attributes:
        repeated_keys: samples whose key came before, so that theirs has `#2`, `#3`, ... behind it.
        other_files: files that are no data, such as a Mac's `._x`.
    """

    repeated_keys: int = 0
    other_files: tuple[str, ...] = ()


class Samples(Protocol):
    """A map-style data set whose keys are known before anything is read; it can be pickled.

    Attributes:
        keys: all different, in the data set's order.
        notes: what was noticed when it was opened.
    """

    keys: list[str]
    notes: DataNotes

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            BadSample: this one cannot be used.
            CachekdError: the data set cannot be read.
        """
        ...

    def preview(self, index: int) -> Preview:
        """A sample's text and number of images, without opening one.

        Raises:
            BadSample: its record cannot be read.
            CachekdError: the data set cannot be read.
        """
        ...


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


class Preview(NamedTuple):
    """A sample's turns and its number of images; no image has been opened for it.

    Attributes:
        texts: of its turns, and of what stands beside them.
        images: how many.
        answered: each answer to a user's turn, as (the user's text, the answer).
    """

    texts: list[str]
    images: int
    answered: tuple[tuple[str, str], ...] = ()


class Subset:
    """The first `limit` samples of a data set after shuffling; its keys are in its own order.

    Args:
        samples: the data set.
        limit: how many at most; None: all.
        shuffle_seed: of the permutation; None: the data set's own order.
        only: indices, of which the others are left out beforehand; None: all.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        order = np.arange(len(samples)) if only is None else np.array(only)
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        self._samples, self._order = samples, order[:limit].copy()
        self.keys = [samples.keys[index] for index in self._order]
        self.notes = samples.notes

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample; raises what the data set does."""
        return self._samples[int(self._order[index])]

    def preview(self, index: int) -> Preview:
        """See `Samples.preview`."""
        return self._samples.preview(int(self._order[index]))
