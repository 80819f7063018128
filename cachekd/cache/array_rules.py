"""What each array of a file must be: its Zarr metadata, and by its name its type, shape and values.

Reading and `verify` share this.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

POSITIVE = float(np.nextafter(0.0, 1.0))  # the least number above zero
MOST_METADATA = 2**16  # bytes; ours have some 700
_TYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("uint8", "uint16", "uint32", "int16", "float32", "float64")
}
NUMBERS = ["numcodecs.pcodec", "crc32c"]  # of more than a byte
BYTES = ["bytes", "blosc", "crc32c"]
_KEYS = {"name": "default", "configuration": {"separator": "/"}}
MOST_CODE = 2**15 - 1  # codes are cut to plus and minus this: int16 has no +32,768
Size = str | int
Sizes = Mapping[str, int]


class ArrayMetadata(NamedTuple):
    """What is said of one array; it is in one chunk."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Its bytes once decoded; a Python integer, so that nothing overflows."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def read_group(content: bytes) -> dict[str, Any]:
    """The attributes in a group's zarr.json.

    Raises:
        ValueError: it is no such thing.
    """
    values = _object(content)
    if (values.get("zarr_format"), values.get("node_type")) != (3, "group"):
        raise ValueError("not a Zarr v3 group")
    attributes = values.get("attributes")
    if not isinstance(attributes, dict):
        raise ValueError("a group without attributes")
    return attributes


@functools.lru_cache(maxsize=256)  # small shards have the same ones over and over
def read_array(name: str, content: bytes) -> ArrayMetadata:
    """What an array's zarr.json says.

    Raises:
        ValueError: it is no such thing, or not as the format has it.
    """
    values = _object(content)
    if (values.get("zarr_format"), values.get("node_type")) != (3, "array"):
        raise ValueError(f"{name} is not an array")
    shape, dtype = values.get("shape"), _TYPES.get(str(values.get("data_type")))
    if not isinstance(shape, list) or len(shape) not in (1, 2) or not all(map(_is_length, shape)):
        raise ValueError(f"{name} has shape {str(shape)[:80]}")
    if dtype is None:
        raise ValueError(f"{name} is of type {str(values.get('data_type'))[:80]}")
    expected = NUMBERS if dtype.itemsize > 1 else BYTES
    chunk = {"name": "regular", "configuration": {"chunk_shape": [max(1, length) for length in shape]}}
    if (found := _names(values.get("codecs"))) != expected:
        raise ValueError(f"{name} has codecs {str(found)[:80]}, expected {expected}")
    if values.get("chunk_grid") != chunk or values.get("chunk_key_encoding") != _KEYS:
        raise ValueError(f"{name} is not in one chunk")
    if values.get("storage_transformers"):
        raise ValueError(f"{name} has storage transformers")
    return ArrayMetadata(tuple(shape), dtype)


def _object(content: bytes) -> dict[str, Any]:
    if len(content) > MOST_METADATA:
        raise ValueError(f"a zarr.json of {len(content):,} bytes")
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("a zarr.json that is not an object")
    return values


def _names(codecs: Any) -> list[Any]:
    listed = codecs if isinstance(codecs, list) else []
    return [codec.get("name") if isinstance(codec, dict) else codec for codec in listed]


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


class ArrayRule(NamedTuple):
    """What one array must be. A name stands for a size, such as `tokens`, that is the same in all of a file.

    Attributes:
        types: that it may have, as in Zarr's metadata.
        shape: its lengths.
        least, most: of its values, both included.
        below: of its values, not included.
        order: of its values.
    """

    types: tuple[str, ...]
    shape: tuple[Size, ...]
    least: float | None = None
    most: Size | None = None
    below: Size | None = None
    order: Literal["ascending", "unique"] | None = None


def require_form(
    rules: Mapping[str, ArrayRule], found: Mapping[str, Any], sizes: Mapping[str, int | None]
) -> dict[str, int]:
    """Compare types and shapes, before anything is decoded.

    Args:
        found: has `dtype` and `shape` of every array.
        sizes: that are known; others follow from the first array that has them.

    Returns:
        all sizes.

    Raises:
        ValueError: an array is of another type, or does not fit the sizes or the other arrays.
    """
    known = {name: size for name, size in sizes.items() if size is not None}
    for name, rule in rules.items():
        array = found[name]
        if array.dtype.name not in rule.types:
            raise ValueError(f"{name} is of type {array.dtype.name}, expected {' or '.join(rule.types)}")
        expected = tuple(_size(size, known) for size in rule.shape)
        fits = len(array.shape) == len(expected) and all(
            of in (None, length) for length, of in zip(array.shape, expected, strict=True)
        )
        if not fits:
            raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
        for size, length in zip(rule.shape, array.shape, strict=True):
            known.setdefault(str(size), length)
    return known


def require_values(rules: Mapping[str, ArrayRule], arrays: Mapping[str, NDArray], sizes: Sizes) -> None:
    """Compare values, each array by itself.

    Args:
        sizes: all that the rules name.

    Raises:
        ValueError: a value is out of range or not finite, or they are out of order.
    """
    for name, rule in rules.items():
        values = arrays[name]
        if not values.size:
            continue
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite")
        low, high = values.min().item(), values.max().item()
        most, below = _size(rule.most, sizes), _size(rule.below, sizes)
        if rule.least is not None and low < rule.least:
            raise ValueError(f"{name} has {low:g}, expected {_least(rule.least)}")
        if most is not None and high > most:
            raise ValueError(f"{name} has {high:,}, expected at most {most:,}{_of(rule.most)}")
        if below is not None and high >= below:
            raise ValueError(f"{name} has {high:,}, expected less than {below:,}{_of(rule.below)}")
        if rule.order == "ascending" and (values[1:] <= values[:-1]).any():
            raise ValueError(f"{name} do not ascend")
        if rule.order == "unique":
            ordered = np.sort(values)  # `np.unique` hashes, in ten times as long
            if (ordered[1:] == ordered[:-1]).any():
                raise ValueError(f"{name} has a value twice")


def _size(size: Size | None, sizes: Sizes) -> int | None:
    return sizes.get(size) if isinstance(size, str) else size


def _least(least: float) -> str:
    return "more than 0" if least == POSITIVE else f"at least {least:g}"


def _of(size: Size | None) -> str:
    return f" ({size})" if isinstance(size, str) else ""
