"""How a data set's records become samples: what the forms of data share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachekd.config import DataOptions
from cachekd.config.data import ROW_NUMBERS
from cachekd.errors import BadSample, CachekdError
from cachekd.samples.conversation import first_given
from cachekd.samples.image_fields import value_at
from cachekd.samples.keys import Keys, unique_keys
from cachekd.samples.map_function import MapFunction, load_map
from cachekd.samples.outline import Outline, outline_of_record
from cachekd.samples.records import sample_from_record
from cachekd.samples.sample import Sample

KEY_FIELDS = ("id", "key", "__key__")


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
        """By what the user says.

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
        """The same for data in a folder, where relative paths start unless the user says otherwise."""
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

    def outline(self, record: Mapping[str, Any]) -> Outline:
        """Of a mapped record, without opening a picture."""
        return outline_of_record(record, self.image_fields)

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
        """The same of a record before its mapping: what the mapped one says, or else the raw one.

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
