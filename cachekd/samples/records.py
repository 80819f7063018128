"""A sample from a record: what a JSON entry, a table's row or somebody's own reader gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from cachekd.errors import BadSample
from cachekd.samples.conversation import first_given, messages_from_turns
from cachekd.samples.images import open_image
from cachekd.samples.sample import Sample, sample_place

IMAGE_FIELDS = ("image", "images")
TURN_FIELDS = ("conversations", "messages")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def sample_from_record(
    key: str, record: Mapping[str, Any], *, origin: str, folder: Path | None = None
) -> Sample:
    """Build a sample from `{"image" or "images", "conversations" or "messages"}`.

    A field that is None counts as absent; where both of a pair are there, the first named here is taken.

    Args:
        key: the sample's.
        record: `image` is one image and `images` a list of them (or one), each as `open_image` takes it;
            `conversations` and `messages` are as `messages_from_turns` takes them.
        origin: the file it came from, for error messages.
        folder: what relative image paths start from.

    Raises:
        BadSample: an image or the conversation cannot be used, or an image has another field's name.
    """
    where = sample_place(key, origin)
    given = first_given(record, *IMAGE_FIELDS)
    if given is None or (isinstance(given, str) and not given):
        given = []
        _refuse_unread_images(record, where)
    sources = given if isinstance(given, list | tuple) else [given]
    images = tuple(open_image(source, where=where, folder=folder) for source in sources)
    return sample_from_llava(key, first_given(record, *TURN_FIELDS), images, origin=origin)


def _refuse_unread_images(record: Mapping[str, Any], where: str) -> None:
    """A sample without an image is text; one whose image has another name must not become text in silence."""
    found = [
        name
        for name, value in record.items()
        if isinstance(value, Image.Image) or (isinstance(value, str) and value.lower().endswith(_SUFFIXES))
    ]
    if found:
        raise BadSample(
            "the sample has an image under another name",
            where=where,
            expected=" or ".join(IMAGE_FIELDS),
            found=", ".join(found),
            fix="rename the field, or give --map module:function, which makes such a record",
        )


def sample_from_llava(key: str, turns: Any, images: tuple[Image.Image, ...], *, origin: str) -> Sample:
    """Build a sample from turns, `[{"from": "human", "value": "<image>\\nWhat?"}, ...]`, and RGB images; a
    sample without an image is text only.

    Raises:
        BadSample: a conversation that cannot be used (see `messages_from_turns`), or no image where it has a
            placeholder for one.
    """
    messages = messages_from_turns(turns, len(images), sample_place(key, origin))
    return Sample(key, images, tuple(messages), origin)
