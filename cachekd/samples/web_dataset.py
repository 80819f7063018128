"""WebDataset tars: `key.png` (or jpg, webp) beside `key.json` with `conversations`.

The tars are indexed once (header by header, without reading the members), so that keys are known before
anything runs, duplicates are found instead of passing in silence, and any sample is one seek away.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError
from webdataset.tariterators import base_plus_ext

from cachekd.errors import CachekdError
from cachekd.samples.sample import Sample, sample_from_llava, upright_rgb

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


class _Member(NamedTuple):
    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


class WebDatasetSamples:
    """A map-style data set over one or more tars, in the order of the tars and of their members."""

    def __init__(self, tars: list[Path]) -> None:
        self._groups: dict[str, dict[str, _Member]] = {}
        for tar in tars:
            self._index(tar)
        self.keys = list(self._groups)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        key = self.keys[index]
        members = self._groups[key]
        image_extension = next((ext for ext in IMAGE_EXTENSIONS if ext in members), None)
        missing = "json" if "json" not in members else None if image_extension else "image"
        if missing:
            raise CachekdError(
                f"the sample has no {missing}",
                where=f"sample {key!r} in {self._tar(key)}",
                expected=f"{key}.json and one of {', '.join(f'{key}.{e}' for e in IMAGE_EXTENSIONS)}",
                found=", ".join(f"{key}.{extension}" for extension in members),
                fix="dots in names split the key from the extension: name files without them",
            )
        origin = str(self._tar(key))
        record = _parse_json(members["json"], key, origin)
        image = _parse_image(members[str(image_extension)], key, origin)
        return sample_from_llava(key, record.get("conversations"), (image,), origin=origin)

    def _tar(self, key: str) -> Path:
        return next(iter(self._groups[key].values())).tar

    def _index(self, path: Path) -> None:
        try:
            with tarfile.open(path) as tar:
                for info in tar:
                    if info.isfile():
                        self._add(info, path)
        except (tarfile.ReadError, EOFError) as error:
            raise CachekdError(
                "the tar cannot be read to its end",
                where=str(path),
                found=str(error),
                fix="fetch or write it again: a truncated tar must not become a shorter data set",
            ) from None

    def _add(self, info: tarfile.TarInfo, path: Path) -> None:
        key, extension = base_plus_ext(info.name)
        if key is None:
            raise CachekdError("a file in the tar has no extension", where=f"{info.name} in {path}")
        members = self._groups.setdefault(key, {})
        first = next(iter(members.values()), None)
        if first is not None and (first.tar != path or extension in members):
            raise CachekdError(
                f"the key {key!r} appears twice",
                where=f"{first.tar} and {path}",
                expected="keys that are unique over all tars: the cache is looked up by them",
                fix="rename one of them, for example by prefixing its source",
            )
        members[extension] = _Member(path, info.offset_data, info.size)


def _parse_json(member: _Member, key: str, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(member.read())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CachekdError(
            "the sample's JSON is not valid", where=f"{key}.json in {origin}", found=str(error)
        ) from None
    if not isinstance(record, dict):
        raise CachekdError(
            "the sample's JSON has an unexpected form",
            where=f"{key}.json in {origin}",
            expected='an object with "conversations"',
            found=type(record).__name__,
        )
    return record


def _parse_image(member: _Member, key: str, origin: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(member.read())) as image:
            return upright_rgb(image)
    except (UnidentifiedImageError, OSError) as error:
        raise CachekdError(
            "an image cannot be read",
            where=f"sample {key!r} in {origin}",
            found=str(error),
            fix="replace the image, or leave the sample out when the tar is written",
        ) from None
