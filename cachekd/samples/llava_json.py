"""LLaVA-style JSON: `[{"id", "image", "conversations"}, ...]` beside a folder of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from cachekd.errors import CachekdError
from cachekd.samples.sample import Sample, sample_from_llava, upright_rgb


class LlavaJsonSamples:
    """A map-style data set over a `.json` or `.jsonl` file; image paths are relative to the file's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = _read_records(path)
        self.keys = _unique_ids(self._records, path)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        record, key = self._records[index], self.keys[index]
        names = record.get("image", record.get("images")) or []
        names = [names] if isinstance(names, str) else names
        images = tuple(self._image(name, key) for name in names)
        return sample_from_llava(key, record.get("conversations"), images, origin=str(self.path))

    def _image(self, name: str, key: str) -> Image.Image:
        path = self.path.parent / name
        try:
            with Image.open(path) as image:
                return upright_rgb(image)
        except FileNotFoundError:
            problem, found = "an image is missing", "no such file"
        except (UnidentifiedImageError, OSError) as error:
            problem, found = "an image cannot be read", str(error)
        raise CachekdError(
            problem,
            where=f"sample {key!r} in {self.path}",
            expected=f"an image at {path}",
            found=found,
            fix="restore the file, or remove the sample from the JSON",
        )


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        lines = path.suffix == ".jsonl"
        records = [json.loads(line) for line in text.splitlines() if line] if lines else json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CachekdError("the data file is not valid JSON", where=str(path), found=str(error)) from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise CachekdError(
            "the data file has an unexpected form",
            where=str(path),
            expected='a list of {"id", "image", "conversations"} objects',
            found=type(records).__name__,
        )
    return records


def _unique_ids(records: list[dict[str, Any]], path: Path) -> list[str]:
    seen: dict[str, int] = {}
    for position, record in enumerate(records):
        if "id" not in record:
            raise CachekdError('a sample has no "id"', where=f"entry {position} of {path}")
        key = str(record["id"])
        if key in seen:
            raise CachekdError(
                f"the key {key!r} appears twice",
                where=f"entries {seen[key]} and {position} of {path}",
                expected="keys that are unique in the data set: the cache is looked up by them",
            )
        seen[key] = position
    return list(seen)
