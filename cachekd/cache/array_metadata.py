"""What an array's zarr.json may say: the two codec chains that are written here, one chunk, few types.

A cache is often somebody else's, so this is decided before a byte is decoded. Zarr itself would take any
codec that happens to be installed, and allocate whatever shape is claimed.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

import numpy as np

_TYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("uint8", "uint16", "uint32", "int16", "float32", "float64")
}
NUMBERS = ["numcodecs.pcodec", "crc32c"]  # of more than a byte
BYTES = ["bytes", "blosc", "crc32c"]
_KEYS = {"name": "default", "configuration": {"separator": "/"}}
MOST_METADATA = 2**16  # bytes; ours have some 700
MOST_DECODED = 2**33  # bytes that one file's arrays may take
_FREE = 2**24  # bytes that any file may decode to
_MOST_RATIO = 2**12  # decoded over stored bytes, beyond that


class ArrayMetadata(NamedTuple):
    """Of one array; it is in one chunk."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Once decoded; a Python integer, so that nothing overflows."""
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


def require_plausible(decoded: int, stored: int) -> None:
    """Refuse a file that would take far more memory than such data ever take.

    Args:
        decoded: bytes of its arrays in memory.
        stored: bytes of the file.

    Raises:
        ValueError: more than 8 GiB, or than 16 MiB and 4,096 times the file.
    """
    most = min(MOST_DECODED, _FREE + _MOST_RATIO * stored)
    if decoded > most:
        raise ValueError(f"{stored:,} bytes claim to hold {decoded:,}, expected {most:,} at most")


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
