"""WebDataset tars: `key.png` (or jpg, webp; `key.0.png`, `key.1.png` for several) beside `key.json`.

A sample of text alone is its `key.json` alone, which names no image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cachekd.errors import BadSample
from cachekd.samples.conversation import first_given
from cachekd.samples.map_function import MapFunction
from cachekd.samples.outline import Outline, outline_of_record
from cachekd.samples.records import IMAGE_FIELDS, sample_from_record
from cachekd.samples.sample import Sample, sample_place
from cachekd.samples.tar_index import index_tars

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
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
        map: applied to each sample as `{"__key__": key, extension: bytes, ...}`; without it, the sample is
            its JSON with the image members as its images.

    Raises:
        CachekdError: a tar cannot be indexed (see `index_tars`).
    """

    def __init__(self, urls: Sequence[str], map: MapFunction | None = None) -> None:
        self._index, self._map = index_tars(urls), map
        self.keys = self._index.keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            BadSample: it cannot be used.
            CachekdError: its tar has gone or changed.
        """
        key, origin = self.keys[index], self._index.url(index)
        if self._map is not None:
            return sample_from_record(key, self._mapped(self._map, index), origin=origin)
        members, record = self._index.members(index), self._record(index)
        if "images" in record:
            record["images"] = [self._index.read(index, members[extension]) for extension in record["images"]]
        return sample_from_record(key, record, origin=origin)

    def outline(self, index: int) -> Outline:
        """See `Samples.outline`. A map function is given the whole sample, bytes of images and all."""
        return outline_of_record(self._record(index) if self._map is None else self._mapped(self._map, index))

    def _record(self, index: int) -> dict[str, Any]:
        """The sample's JSON; its images, if it has any, are extensions, not read yet."""
        key, origin, members = self.keys[index], self._index.url(index), self._index.members(index)
        text_alone = "json" in members and members.keys() <= _TEXT_ALONE
        images = [] if text_alone else _image_extensions(members, key, origin)
        record = _parse_json(self._index.read(index, members["json"]), key, origin)
        if text_alone and first_given(record, *IMAGE_FIELDS):
            raise _lacks("image", members, key, origin)
        record = {name: value for name, value in record.items() if name not in IMAGE_FIELDS}
        return {**record, "images": images} if images else record

    def _mapped(self, map: MapFunction, index: int) -> Mapping[str, Any]:
        key, members = self.keys[index], self._index.members(index)
        files = {extension: self._index.read(index, member) for extension, member in members.items()}
        return map({"__key__": key, **files}, key, self._index.url(index))


def _image_extensions(members: Mapping[str, Any], key: str, origin: str) -> list[str]:
    """A sample's images: one without a number, or consecutive numbers."""
    found = {extension: match[1] for extension in members if (match := _IMAGE.fullmatch(extension))}
    missing = "json" if "json" not in members else "image" if not found else None
    if missing:
        raise _lacks(missing, members, key, origin)
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
        expected=f"{key}.json and one of {_names(key, IMAGE_EXTENSIONS)} (or {key}.0.png, {key}.1.png)",
        found=_names(key, members),
        fix="dots in names split the key from the extension: name files without them",
    )


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
