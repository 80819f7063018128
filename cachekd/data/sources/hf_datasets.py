"""Hugging Face `datasets`: rows with `messages` or `conversations`, and mostly `image` or `images`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from cachekd.config.data import ROW_NUMBERS
from cachekd.data.conversation import SYSTEM_FIELDS, TURN_FIELDS
from cachekd.data.image_fields import IMAGE_FIELDS, pictures_of
from cachekd.data.preview import preview_of_record
from cachekd.data.records import KEY_FIELDS, RecordReader
from cachekd.data.sample import DataNotes, Preview, Sample
from cachekd.data.sources.hf_load import HfSpec, load_split
from cachekd.errors import CachekdError

_TEXTS = (*TURN_FIELDS, *SYSTEM_FIELDS, "tools")


class HfDatasetSamples:
    """A map-style data set over one split. Images stay encoded until their sample is read.

    The keys are the column `id`, `key` or `__key__` (the first there is), or else the row numbers. They are
    taken before the mapping, which would read every image; only a `--key` that is no column is taken after.

    Args:
        spec: what to load.
        reader: how rows become samples. A map function is given each row, as a dict whose images are
            `{"bytes", "path"}`.

    Raises:
        CachekdError: it cannot be loaded, lacks columns, or has keys that are none.
    """

    def __init__(self, spec: HfSpec, reader: RecordReader) -> None:
        dataset = load_split(spec)
        self._origin = spec.path if spec.split is None else f"{spec.path}?split={spec.split}"
        self._reader = reader.beside(_folder(spec))
        if self._reader.map is None:
            _require_columns(dataset, self._origin, self._reader.image_fields)
        self._features = datasets.Features(
            {name: _undecoded(feature) for name, feature in dataset.features.items()}
        )
        # Rows are taken as Arrow and read by the features without decoders: a broken image is then met by
        # open_image like any other, and reading the keys does not open one.
        self._rows = dataset.with_format("arrow")
        # What `preview` reads without a map function: the texts, and of images how many there are.
        names = [name for name in dataset.column_names if name in _TEXTS]
        self._texts = self._rows.select_columns(names)
        self.keys, repeated = self._reader.keys(self._key_values(dataset), self._origin, row="row")
        self.notes = DataNotes(repeated_keys=repeated)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            BadSample: it cannot be used.
            CachekdError: the row cannot be read.
        """
        return self._reader.sample(self.keys[index], self._mapped(index), self._place(index))

    def preview(self, index: int) -> Preview:
        """See `Samples.preview`. A map function is given the whole row, bytes of images and all."""
        if self._reader.map is not None:
            return self._reader.preview(self._mapped(index))
        preview = preview_of_record(self._record(self._texts, index))
        return preview if preview.images else preview._replace(images=self._images(index))

    def _images(self, index: int) -> int:
        """How many; of a column Arrow says so without reading one."""
        row = self._rows[index]

        def count(name: str) -> int:
            if name in row.column_names:
                return _count(row.column(name)[0])
            return len(pictures_of(self._record(self._rows, index), [name]))  # a field within a column

        if self._reader.image_fields:
            return sum(map(count, self._reader.image_fields))
        there = (count(name) for name in IMAGE_FIELDS if name in row.column_names)
        return next((number for number in there if number), 0)

    def _place(self, index: int) -> str:
        return f"{self._origin}, row {index}"

    def _mapped(self, index: int) -> Mapping[str, Any]:
        return self._reader.mapped(self._record(self._rows, index), self.keys[index], self._place(index))

    def _record(self, rows: datasets.Dataset, index: int) -> Mapping[str, Any]:
        origin = self._place(index)
        try:
            features = {name: self._features[name] for name in rows.column_names}
            row: Any = datasets.Features(features).decode_example(rows[index].to_pylist()[0])
        except MemoryError:
            raise
        except Exception as error:  # pyarrow's or the operating system's: the files have gone or changed
            raise CachekdError(
                "a row of the data set cannot be read", where=origin, found=f"{type(error).__name__}: {error}"
            ) from error
        return row

    def _key_values(self, dataset: datasets.Dataset) -> list[Any]:
        """Read what each row's key is; None for the row's number."""
        wished, columns = self._reader.key, dataset.column_names
        if wished == ROW_NUMBERS:
            return [None] * len(dataset)
        names = KEY_FIELDS if wished is None else (wished, wished.partition(".")[0])
        column = next((name for name in names if name in columns), None)
        if column is not None:
            rows = dataset.with_format(None).select_columns([column])
            if wished is None or column == wished:
                return list(rows[:][column])
            return [self._reader.key_of(row) for row in rows]
        if wished is None or self._reader.map is None:
            return [None] * len(dataset)
        records = (self._record(self._rows, index) for index in range(len(dataset)))
        return [self._reader.mapped_key(row, place, self._origin) for place, row in enumerate(records)]


def _count(value: Any) -> int:
    """How many pictures an Arrow value is."""
    if not value.is_valid:
        return 0
    if isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return len(value)
    is_text = isinstance(value, pa.StringScalar | pa.LargeStringScalar)  # a path
    return int(not is_text or value.as_py() != "")


def _require_columns(dataset: datasets.Dataset, origin: str, image_fields: Sequence[str]) -> None:
    columns = dataset.column_names
    lacking = [name for name in image_fields if not _leads_somewhere(dict(dataset.features), name)]
    if not set(TURN_FIELDS) & set(columns) or lacking:
        raise CachekdError(
            "the data set lacks columns",
            where=origin,
            expected=f"{' or '.join(TURN_FIELDS)}, and for images {', '.join(image_fields or IMAGE_FIELDS)}",
            found=", ".join(columns),
            fix="--image-field NAME takes images from another column; --map module:function makes such a "
            "record of a row",
        )


def _leads_somewhere(feature: Any, path: str) -> bool:
    """Whether a dotted name is that of a field, within lists too."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _leads_somewhere(feature.feature, path)
    if isinstance(feature, list):
        return _leads_somewhere(feature[0], path)
    if not isinstance(feature, Mapping):
        return False
    cuts = [at for at, character in enumerate(path) if character == "."]
    return path in feature or any(
        path[:cut] in feature and _leads_somewhere(feature[path[:cut]], path[cut + 1 :]) for cut in cuts
    )


def _undecoded(feature: Any) -> Any:
    """A feature with the decoders of images, audio and video in it switched off."""
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature), **_length(feature))
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    return dataclasses.replace(feature, decode=False) if hasattr(feature, "decode") else feature


def _length(feature: Any) -> dict[str, int]:
    return {"length": feature.length} if isinstance(feature, datasets.List) else {}


def _folder(spec: HfSpec) -> Path | None:
    """Where relative image paths start: beside the files, or in the current directory for the hub."""
    path = Path(spec.path)
    if path.is_dir():
        return path
    return path.parent if path.suffix else None
