"""LLaVA-style JSON: `[{"id", "image", "conversations"}, ...]` beside a folder of images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cachekd.data.conversation import TURN_FIELDS
from cachekd.data.records import RecordReader
from cachekd.data.sample import DataNotes, Preview, Sample
from cachekd.errors import CachekdError

ReadFile = Callable[[Path], list[dict[str, Any]]]
_FORM = 'a list of {"id", "image", "conversations"} objects, or such an object a line'


class RecordFileSamples:
    """A map-style data set over one file, whose records are all in memory.

    The keys are the field `id`, `key` or `__key__` of each record after its mapping (the first there is), or
    else its number.

    Args:
        path: the file.
        read: reads its records, in order.
        reader: how records become samples; it is given each record, as a dict.

    Raises:
        CachekdError: the file cannot be read, or has keys that are none.
    """

    def __init__(self, path: Path, read: ReadFile, reader: RecordReader) -> None:
        self.path, self._reader, self._origin = path, reader, str(path)
        self._records = read(path)
        if reader.map is None:
            _refuse_wrapping(self._records, path)
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

    def preview(self, index: int) -> Preview:
        """See `Samples.preview`."""
        return self._reader.preview(self._record(index))

    def _record(self, index: int) -> Mapping[str, Any]:
        return self._reader.mapped(self._records[index], self.keys[index], self._origin)


def read_llava_json(path: Path) -> list[dict[str, Any]]:
    """Read a list of objects, or an object a line.

    Raises:
        CachekdError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a BOM
    except UnicodeDecodeError as error:
        raise _not_json(str(path), error) from None
    except OSError as error:
        raise CachekdError("the data file cannot be read", where=str(path), found=str(error)) from None
    # What it holds counts, not how it is called: lists are called .jsonl and lines .json.
    first = text.lstrip()[:1]
    records = _objects(text, path) if first == "{" else _parse(text or "[]", str(path))
    listed = isinstance(records, list)
    odd = [item for item in records if not isinstance(item, dict)] if listed else [records]
    if odd:
        raise CachekdError(
            "the data file has an unexpected form",
            where=str(path),
            expected=_FORM,
            found=("a list with " if listed else "") + type(odd[0]).__name__,
        )
    return records


def _objects(text: str, path: Path) -> list[Any]:
    """Parse an object a line, or one object over several lines."""
    # Not splitlines(): it also breaks at U+2028 and others, which JSON allows inside a string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        return [_parse(line, f"line {number} of {path}") for number, line in lines]
    except CachekdError:
        if _is_json(lines[0][1]) or not _is_json(text):
            raise
        return [json.loads(text)]


def _refuse_wrapping(records: list[dict[str, Any]], path: Path) -> None:
    """Refuse a file whose only object is no record: it wraps the list."""
    only = records[0] if len(records) == 1 else {}
    lists = [name for name, value in only.items() if isinstance(value, list) and _holds_objects(value)]
    if lists and not any(name in only for name in TURN_FIELDS):
        raise CachekdError(
            "the data file holds one object",
            where=str(path),
            expected=_FORM,
            found=f"an object of {', '.join(map(repr, list(only)[:8]))}",
            fix=f"save the list in {lists[0]!r} as a file of its own",
        )


def _holds_objects(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, dict) for item in value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _not_json(where, error) from None


def _not_json(where: str, error: Exception) -> CachekdError:
    return CachekdError("the data file is not valid JSON", where=where, found=str(error)[:200])
