"""LLaVA-style JSON: `[{"id", "image", "conversations"}, ...]` beside a folder of images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cachekd.errors import CachekdError
from cachekd.samples.outline import Outline
from cachekd.samples.protocol import DataNotes
from cachekd.samples.record_reader import RecordReader
from cachekd.samples.sample import Sample


class LlavaJsonSamples:
    """A map-style data set over a file that holds a list of objects, or an object a line.

    The keys are the field `id`, `key` or `__key__` of each record after its mapping (the first there is), or
    else its number.

    Args:
        path: the file.
        reader: how records become samples; it is given each entry, as a dict.

    Raises:
        CachekdError: the file cannot be read, is no list of objects, or has keys that are none.
    """

    def __init__(self, path: Path, reader: RecordReader) -> None:
        self.path, self._reader, self._origin = path, reader, str(path)
        self._records = _read_records(path)
        reader.require_image_fields(self._records, self._origin)
        values = [
            reader.mapped_key(record, position, self._origin) for position, record in enumerate(self._records)
        ]
        self.keys, repeated = reader.keys(values, self._origin)
        self.notes = DataNotes(repeated_keys=repeated)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            BadSample: it cannot be used.
            CachekdError: the data set's folder has gone.
        """
        if not self.path.parent.exists():
            raise CachekdError("the data set's folder has gone", where=str(self.path.parent))
        return self._reader.sample(self.keys[index], self._record(index), self._origin)

    def outline(self, index: int) -> Outline:
        """See `Samples.outline`."""
        return self._reader.outline(self._record(index))

    def _record(self, index: int) -> Mapping[str, Any]:
        return self._reader.mapped(self._records[index], self.keys[index], self._origin)


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a BOM
    except UnicodeDecodeError as error:
        raise _not_json(str(path), error) from None
    except OSError as error:
        raise CachekdError("the data file cannot be read", where=str(path), found=str(error)) from None
    # What it holds counts, not how it is called: lists are called .jsonl and lines .json.
    first = text.lstrip()[:1]
    records = list(_lines(text, path)) if first == "{" else _parse(text or "[]", str(path))
    listed = isinstance(records, list)
    odd = [item for item in records if not isinstance(item, dict)] if listed else [records]
    if odd:
        raise CachekdError(
            "the data file has an unexpected form",
            where=str(path),
            expected='a list of {"id", "image", "conversations"} objects, or such an object a line',
            found=("a list with " if listed else "") + type(odd[0]).__name__,
        )
    return records


def _lines(text: str, path: Path) -> Iterator[Any]:
    # Not splitlines(): it also breaks at U+2028 and others, which JSON allows inside a string.
    lines = text.split("\n")
    if _is_one_object(lines):
        raise CachekdError(
            "the data file holds one object",
            where=str(path),
            expected='a list of {"id", "image", "conversations"} objects, or such an object a line',
            found=f"an object of {', '.join(map(repr, list(json.loads(text))[:8]))}",
            fix="save the list in it as a file of its own",
        )
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse(line, f"line {number} of {path}")


def _is_one_object(lines: list[str]) -> bool:
    """Whether the file is an object over several lines, which would be a list's wrapping, not a record."""
    try:
        json.loads(next(line for line in lines if line.strip()))
    except (ValueError, RecursionError):
        pass
    else:
        return False
    try:
        return isinstance(json.loads("\n".join(lines)), dict)
    except (ValueError, RecursionError):
        return False


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _not_json(where, error) from None


def _not_json(where: str, error: Exception) -> CachekdError:
    return CachekdError("the data file is not valid JSON", where=where, found=str(error)[:200])
