"""WebDataset tars: `key.png` (or jpg, webp, ...; `key.0.png`, `key.1.png` for several) beside `key.json`.

A sample of text alone is its `key.json` alone, which names no image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cachekd.config.data import ROW_NUMBERS
from cachekd.data.conversation import first_given
from cachekd.data.image_fields import (
    IMAGE_FIELDS,
    IMAGE_SUFFIXES,
    how_to_take,
    pictures_of,
    under_another_name,
)
from cachekd.data.records import RecordReader
from cachekd.data.sample import DataNotes, Preview, Sample, sample_place
from cachekd.data.sources.tars import index_tars
from cachekd.errors import BadSample

IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
_IMAGE = re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})")
# All that a sample of text alone may have; targets are what `cachekd export` writes. Anything else may be an
# image that is not recognised, which must not make text of the sample.
_TEXT_ALONE = {"json", "txt", "targets.npz"}


class WebDatasetSamples:
    """A map-style data set over one or more tars, in the order of the tars and of their members.

    It can be pickled, and read in forked and spawned workers. A worker of a `simplecache::` URL fetches its
    own copy, unless FSSPEC_SIMPLECACHE_CACHE_STORAGE names a folder for all.

    Args:
        urls: the tars' paths or fsspec URLs.
        reader: how records become samples. A map function is given `{"__key__": key, extension: bytes, ...}`;
            without one, the sample is its JSON with the image members as its images. Image fields may be
            extensions, such as `left.png`, as well as fields of the JSON.

    Raises:
        CachekdError: a tar cannot be indexed (see `index_tars`).
    """

    def __init__(self, urls: Sequence[str], reader: RecordReader) -> None:
        self._index, self._reader = index_tars(urls), reader
        values = [self._key(index) for index in range(len(self._index.names))]
        self.keys, repeated = reader.keys(values, ", ".join(urls[:2]), row="sample")
        self.notes = DataNotes(repeated, self._index.other_files)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            BadSample: it cannot be used.
            CachekdError: its tar has gone or changed.
        """
        key, origin, record = self.keys[index], self._index.url(index), self._record(index)
        if self._reader.map is None:
            members = self._index.members(index)
            for field, extensions in self._image_members(index).items():
                images = [self._index.read(index, members[extension]) for extension in extensions]
                record = {**record, field: images}
        return self._reader.sample(key, record, origin)

    def preview(self, index: int) -> Preview:
        """See `Samples.preview`. A map function is given the whole sample, bytes of images and all."""
        return self._reader.preview(self._record(index))

    def _key(self, index: int) -> Any:
        """The members' name, or what the record says, for which it is read."""
        if self._reader.key in (None, ROW_NUMBERS):
            return self._index.names[index] if self._reader.key is None else None
        try:
            return self._reader.key_of(self._record(index))
        except BadSample:  # said again when the sample is read
            return None

    def _record(self, index: int) -> Mapping[str, Any]:
        """What the map function makes of the sample; without one, its JSON, and its images, if it has any,
        as extensions, not read yet."""
        name, origin, members = self._index.names[index], self._index.url(index), self._index.members(index)
        if self._reader.map is not None:
            files = {extension: self._index.read(index, member) for extension, member in members.items()}
            return self._reader.mapped({"__key__": name, **files}, name, origin)
        if "json" not in members:
            raise _lacks("json", members, name, origin)
        record = _parse_json(self._index.read(index, members["json"]), name, origin)
        images = self._image_members(index)
        if not images and self._reader.folder is None and first_given(record, *IMAGE_FIELDS):
            raise _lacks("image", members, name, origin)
        if images and not self._reader.image_fields:
            record = {field: value for field, value in record.items() if field not in IMAGE_FIELDS}
        record = {**record, **images}
        if self._reader.image_fields and not pictures_of(record, self._reader.image_fields):
            _refuse_images(members, self._reader.image_fields, name, origin)
        return record

    def _image_members(self, index: int) -> dict[str, list[str]]:
        """Which of the sample's members are images, by the field of the record that they stand for."""
        name, origin, members = self._index.names[index], self._index.url(index), self._index.members(index)
        if fields := self._reader.image_fields:
            return {field: [field.lower()] for field in fields if field.lower() in members}
        if members.keys() <= _TEXT_ALONE:
            return {}
        return {"images": _image_extensions(members, name, origin)}


def _refuse_images(members: Mapping[str, Any], fields: Sequence[str], key: str, origin: str) -> None:
    """Refuse a sample whose images would not be read: it would become text."""
    found = [extension for extension in members if f".{extension}".endswith(IMAGE_SUFFIXES)]
    if found:
        fix = how_to_take(found[0], asked=fields)
        raise under_another_name(sample_place(key, origin), _names(key, fields), _names(key, found), fix)


def _image_extensions(members: Mapping[str, Any], key: str, origin: str) -> list[str]:
    """A sample's images: one without a number, or consecutive numbers."""
    found = {extension: match[1] for extension in members if (match := _IMAGE.fullmatch(extension))}
    if not found:
        raise _lacks("image", members, key, origin)
    others = [name for name in members.keys() - found.keys() if f".{name}".endswith(IMAGE_SUFFIXES)]
    if others:
        expected = f"images in {_names(key, found)} alone"
        fix = how_to_take(min(others), taken=next(iter(found)))
        raise under_another_name(sample_place(key, origin), expected, _names(key, sorted(others)), fix)
    if len(found) == 1:
        return list(found)
    ordered = sorted(found, key=lambda extension: int(found[extension] or -1))
    numbers = [int(found[extension] or -1) for extension in ordered]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] < 0:
        raise BadSample(
            "the sample's images have no clear order",
            where=sample_place(key, origin),
            expected=f"one image, or consecutive numbers: {_names(key, ('0.png', '1.png'))}",
            found=_names(key, ordered),
        )
    return ordered


def _lacks(what: str, members: Mapping[str, Any], key: str, origin: str) -> BadSample:
    return BadSample(
        f"the sample has no {what}",
        where=sample_place(key, origin),
        expected=f"{key}.json and one of {_names(key, IMAGE_EXTENSIONS[:4])}, ... (or {key}.0.png, "
        f"{key}.1.png)",
        found=_names(key, members),
        fix=_way_on(what, members),
    )


def _way_on(what: str, members: Mapping[str, Any]) -> str:
    if what == "json":
        return "--map module:function makes a record of what there is"
    if other := next((name for name in members if f".{name}".endswith(IMAGE_SUFFIXES)), None):
        return (
            f"--image-field {other} takes it; dots in names split the key from the extension: name files "
            "without them"
        )
    return "--image-root DIR, where the JSON names a file that is not in the tar; else leave the sample out"


def _names(key: str, extensions: Iterable[str]) -> str:
    return ", ".join(f"{key}.{extension}" for extension in extensions)


def _parse_json(content: bytes, key: str, origin: str) -> dict[str, Any]:
    where = f"{key}.json in {origin}"
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: of JSON and of UTF-8
        raise BadSample("the sample's JSON is not valid", where=where, found=str(error)) from None
    if not isinstance(record, dict):
        raise BadSample(
            "the sample's JSON has an unexpected form",
            where=where,
            expected='an object with "conversations" or "messages"',
            found=type(record).__name__,
        )
    return record
