"""A record of a data set becomes a sample."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from cachekd.config import DataOptions
from cachekd.config.data import ROW_NUMBERS
from cachekd.data.conversation import SYSTEM_FIELDS, TURN_FIELDS, first_given, messages_from_turns
from cachekd.data.image_fields import decoded, pictures_of, refuse_untaken, value_at
from cachekd.data.images import open_image
from cachekd.data.map_function import MapFunction, load_map
from cachekd.data.preview import preview_of_record
from cachekd.data.sample import Keys, Preview, Sample, sample_place, unique_keys
from cachekd.data.turn_fields import IMAGES_BESIDE, is_given, refuse_media
from cachekd.errors import BadSample, CachekdError

KEY_FIELDS = ("id", "key", "__key__")


def sample_from_record(
    key: str,
    record: Mapping[str, Any],
    *,
    origin: str,
    folder: Path | None = None,
    image_fields: Sequence[str] = (),
) -> Sample:
    """Build a sample from `{"image" or "images", "conversations" or "messages"}`, and `system` and `tools`.

    A field that is None counts as absent; where both of a pair are there, the first named here is taken.

    Args:
        key: the sample's.
        record: `image` is one image and `images` a list of them (or one), each as `open_image` takes it;
            `conversations` and `messages` are as `messages_from_turns` takes them; `system` or
            `system_prompt` is the text of the first, system turn; `tools` is as `tools_of` takes it.
        origin: the file it came from, for error messages.
        folder: what relative image paths start from.
        image_fields: dotted names of the fields that hold the images, in their order (see `pictures_of`).
            Where they hold one, nothing else is looked at. Empty: `image` and `images`. A sample with what
            looks like an image elsewhere is refused.

    Raises:
        BadSample: an image, the conversation, the system text or the tools cannot be used, an image has
            another field's name, or there is video or audio.
    """
    where = sample_place(key, origin)
    refuse_media(record, where, "the record")
    _refuse_turns_images(image_fields, where)
    pictures = pictures_of(record, image_fields)
    if not (image_fields and pictures):  # else the user has said which they are
        refuse_untaken(record, pictures, where, image_fields)
    images = tuple(
        open_image(decoded(picture.source), where=where, folder=folder, name=picture.name)
        for picture in pictures
    )
    return sample_from_llava(
        key,
        first_given(record, *TURN_FIELDS),
        images,
        origin=origin,
        system=system_of(record, where),
        tools=tools_of(record, where),
    )


def sample_from_llava(
    key: str,
    turns: Any,
    images: tuple[Image.Image, ...],
    *,
    origin: str,
    system: str | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> Sample:
    """Build a sample from turns, `[{"from": "human", "value": "<image>\\nWhat?"}, ...]`, and RGB images; a
    sample without an image is text only.

    Args:
        key: the sample's.
        turns: as `messages_from_turns` takes them; where image parts have an `index`, it is that of `images`.
        images: the sample's.
        origin: the file it came from, for error messages.
        system: a text for the first, system turn.
        tools: JSON values for the chat template.

    Raises:
        BadSample: a conversation that cannot be used (see `messages_from_turns`), or no image where it has a
            placeholder for one.
    """
    messages = messages_from_turns(turns, len(images), sample_place(key, origin), system)
    parts = [part for message in messages for part in message["content"]]
    order = [part.pop("index") for part in parts if "index" in part]
    placed = tuple(images[index] for index in order) if order else images
    return Sample(key, placed, tuple(messages), origin, tuple(tools))


def system_of(record: Mapping[str, Any], where: str) -> str | None:
    """The text of a record's `system` or `system_prompt`; None where it has none, or an empty one.

    Raises:
        BadSample: it is not text, or the two are different texts.
    """
    given = {name: record[name] for name in SYSTEM_FIELDS if is_given(record.get(name))}
    for name, value in given.items():
        if not isinstance(value, str):
            raise BadSample(
                f'the record\'s "{name}" is not text', where=where, expected="text", found=repr(value)[:120]
            )
    if len(set(given.values())) > 1:
        raise BadSample(
            "the record has two system texts",
            where=where,
            found=", ".join(f'"{name}": {text[:60]!r}' for name, text in given.items()),
            fix="keep one of them",
        )
    return next(iter(given.values()), None)


def tools_of(record: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """A record's `tools`, a list of mappings or the JSON text of one; none where it is empty.

    What is None in a list's mappings is left out: a table gives each tool the fields of all. JSON text is
    taken as it stands.

    Raises:
        BadSample: it is something else.
    """
    given = record.get("tools")
    if not is_given(given):
        return ()
    try:
        # To JSON and back: what is rendered and hashed must be JSON values.
        tools = json.loads(given if isinstance(given, str) else json.dumps(_without_nulls(given)))
        found = repr(given)
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: bytes and the like
        tools, found = "", f"{type(error).__name__}: {error}"
    if tools is None:  # the text "null"
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadSample(
            'the record\'s "tools" cannot be read',
            where=where,
            expected="a list of JSON objects, or the JSON text of one",
            found=found[:120],
        )
    return tuple(tools)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _refuse_turns_images(image_fields: Sequence[str], where: str) -> None:
    within = [name for name in image_fields if name.partition(".")[0] in TURN_FIELDS]
    if within:
        raise BadSample(
            "images within turns cannot be taken",
            where=where,
            found=f"--image-field {within[0]}",
            fix=IMAGES_BESIDE,
        )


@dataclass(frozen=True)
class RecordReader:
    """A data set's options, ready for use; it can be pickled.

    Attributes:
        map: somebody's own function, applied to each record; None: records are taken as they are.
        key: see `DataOptions`.
        image_fields: likewise; empty: the usual ones.
        folder: where relative paths of pictures start; None: the current directory.
    """

    map: MapFunction | None = None
    key: str | None = None
    image_fields: tuple[str, ...] = ()
    folder: Path | None = None

    @classmethod
    def of(cls, options: DataOptions) -> RecordReader:
        """Make one by what the user says.

        Raises:
            CachekdError: the map function cannot be imported, or there is no such image root.
        """
        root = options.image_root
        if root is not None and not root.is_dir():
            raise CachekdError(
                "the image root is no folder",
                where=str(root),
                expected="the folder that the pictures' relative paths start from",
                found="a file" if root.exists() else "nothing",
            )
        function = None if options.map is None else load_map(options.map)
        return cls(function, options.key, options.image_field, root)

    def beside(self, folder: Path | None) -> RecordReader:
        """Read data in a folder, where relative paths start unless the user says otherwise."""
        return self if self.folder is not None else replace(self, folder=folder)

    def mapped(self, record: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any]:
        """The record, by the map function if there is one.

        Raises:
            BadSample: the function failed on it.
        """
        # A copy: a function may change what it gets, and a sample may be read again.
        return record if self.map is None else self.map(copy.deepcopy(dict(record)), key, origin)

    def sample(self, key: str, record: Mapping[str, Any], origin: str) -> Sample:
        """The sample of a mapped record.

        Raises:
            BadSample: it cannot be used.
        """
        return sample_from_record(
            key, record, origin=origin, folder=self.folder, image_fields=self.image_fields
        )

    def preview(self, record: Mapping[str, Any]) -> Preview:
        """Preview a mapped record, without opening a picture."""
        return preview_of_record(record, self.image_fields)

    def require_image_fields(self, records: Sequence[Mapping[str, Any]], where: str) -> None:
        """Refuse a name that is mistyped: it would make texts of all samples.

        Raises:
            CachekdError: no record has an image field that was asked for.
        """
        for name in self.image_fields if self.map is None else ():
            if all(value_at(record, name) is None for record in records):
                raise CachekdError(
                    f"no record has the field {name!r} that is to hold pictures",
                    where=where,
                    found=f"fields such as {', '.join(list(records[0])[:8])}" if records else None,
                    fix="--image-field FIELD (dotted for a field within a field)",
                )

    def keys(self, values: list[Any], where: str, *, row: str = "entry") -> Keys:
        """Keys of the values of `key_of`.

        Raises:
            CachekdError: no record has the field that was asked for.
        """
        named = self.key not in (None, ROW_NUMBERS)
        if named and values and all(value is None for value in values):
            raise CachekdError(
                f"no record has the field {self.key!r} that is to be the key",
                where=where,
                fix="--key FIELD (dotted for a field within a field), or --key index for row numbers",
            )
        return unique_keys(values, where, row=row)

    def key_of(self, record: Mapping[str, Any]) -> Any:
        """What a mapped record says its key is; None: it is the row's number."""
        if self.key == ROW_NUMBERS:
            return None
        return first_given(record, *KEY_FIELDS) if self.key is None else value_at(record, self.key)

    def mapped_key(self, record: Mapping[str, Any], position: int, origin: str) -> Any:
        """What a record before its mapping says its key is: what the mapped one says, or else the raw one.

        A record that the function fails on is named by its raw key when it is read.
        """
        raw = self.key_of(record)
        if self.map is None or self.key == ROW_NUMBERS:
            return raw
        try:
            mapped = self.key_of(self.mapped(record, str(position), origin))
        except BadSample:
            return raw
        return raw if mapped is None else mapped
