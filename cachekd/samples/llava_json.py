"""LLaVA-style JSON: `[{"id", "image", "conversations"}, ...]` beside a folder of images."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachekd.errors import CachekdError
from cachekd.samples.keys import unique_keys
from cachekd.samples.map_function import MapFunction
from cachekd.samples.outline import Outline, outline_of_record
from cachekd.samples.records import sample_from_record
from cachekd.samples.sample import Sample


class LlavaJsonSamples:
    """A map-style data set over a `.json` or `.jsonl` file; image paths are relative to the file's folder.

    Args:
        path: the file.
        map: applied to each entry, as a dict.

    Raises:
        CachekdError: the file cannot be read, is no list of objects, or has an absent or repeated id.
    """

    def __init__(self, path: Path, map: MapFunction | None = None) -> None:
        self.path, self._map = path, map
        self._records = _read_records(path)
        self.keys = unique_keys((record.get("id") for record in self._records), str(path))

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
        record = self._record(index)
        return sample_from_record(self.keys[index], record, origin=str(self.path), folder=self.path.parent)

    def outline(self, index: int) -> Outline:
        """See `Samples.outline`."""
        return outline_of_record(self._record(index))

    def _record(self, index: int) -> Mapping[str, Any]:
        record = self._records[index]
        if self._map is None:
            return record
        # A copy: a function may change what it gets, and a sample may be read again.
        return self._map(copy.deepcopy(record), self.keys[index], str(self.path))


def _read_records(path: Path) -> list[dict[str, Any]]:
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        records: Any = []
        if path.suffix == ".jsonl":
            # Not splitlines(): it also breaks at U+2028 and others, which JSON allows inside a string.
            for number, line in enumerate(text.split("\n"), 1):
                where = f"line {number} of {path}"
                if line.strip():
                    records.append(json.loads(line))
        else:
            records = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CachekdError("the data file is not valid JSON", where=where, found=str(error)) from None
    except OSError as error:
        raise CachekdError("the data file cannot be read", where=str(path), found=str(error)) from None
    listed = isinstance(records, list)
    odd = [item for item in records if not isinstance(item, dict)] if listed else [records]
    if odd:
        raise CachekdError(
            "the data file has an unexpected form",
            where=str(path),
            expected='a list of {"id", "image", "conversations"} objects',
            found=("a list with " if listed else "") + type(odd[0]).__name__,
        )
    return records
