"""Named arrays in one file: a plain Zarr v3 group in a stored zip, the same bytes for the same content.

Any Zarr reader that has numcodecs with pcodec opens it. Numbers go through PCodec, which stays within a few
percent of their order-0 entropy where zstd needs a quarter to a half more (docs/what-the-cache-keeps.md);
bytes go through zstd. Every chunk ends with its crc32c.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.codecs.numcodecs import PCodec
from zarr.core.buffer import Buffer, cpu
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from cachekd.errors import CachekdError

_PAGE = 2**18  # PCodec's own limit for numbers that share a table
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold


def pack_arrays(arrays: dict[str, NDArray], attributes: dict[str, Any]) -> bytes:
    """The file's bytes.

    Args:
        arrays: one-dimensional, or two-dimensional with statistics that change from row to row: every row is
            coded by itself.
        attributes: of the group; JSON.
    """
    members: dict[str, Any] = {}
    with warnings.catch_warnings():
        # Zarr says that PCodec is not in its specification; the module docstring says what a reader needs.
        warnings.simplefilter("ignore", ZarrUserWarning)
        group = zarr.create_group(MemoryStore(members), attributes=attributes)
        for name, values in arrays.items():
            _write(group, name, values)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), members[name].to_bytes())
    return stream.getvalue()


def read_arrays(
    path: Path, names: Sequence[str], attributes: dict[str, Any], sha256: str | None = None
) -> dict[str, NDArray]:
    """Read and check whole arrays.

    Args:
        names: those that must be there.
        attributes: that the group must have, among others.
        sha256: of the file. Every chunk has its own checksum, but not the bytes between them; without it only
            what is asked for is read from the disk.

    Raises:
        CachekdError: the file is not what it should be, or is damaged: what failed, and where.
    """
    try:
        with zipfile.ZipFile(path if sha256 is None else io.BytesIO(_checked(path, sha256))) as archive:
            members = _members(archive, names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZarrUserWarning)
            group = zarr.open_group(MemoryStore(dict(members)), mode="r")
            found = {name: group.attrs.get(name) for name in attributes}
            if found != attributes:
                raise ValueError(f"attributes {found}, expected {attributes}")
            return {name: _read(group, name, set(members)) for name in names}
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None


def _checked(path: Path, sha256: str) -> bytes:
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"sha256 {found}, expected {sha256}")
    return content


def _members(archive: zipfile.ZipFile, names: Sequence[str]) -> dict[str, Buffer]:
    """The group's and the named arrays' own; zipfile compares each with its crc32."""
    prefixes = tuple(f"{name}/" for name in names)
    found: dict[str, Buffer] = {}
    for info in archive.infolist():
        if info.filename == "zarr.json" or info.filename.startswith(prefixes):
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed, and may be a zip bomb")
            found[info.filename] = cpu.Buffer.from_bytes(archive.read(info))
    return found


def damaged(path: Path, found: str) -> CachekdError:
    """The error for a file of a cache that cannot be used."""
    return CachekdError(
        f"the {'shard' if path.parent.name == 'shards' else 'file'} is damaged",
        where=str(path),
        found=found,
        fix="fetch it again, or make it again: `cachekd verify --repair` with teacher and data",
    )


def _write(group: zarr.Group, name: str, values: NDArray) -> None:
    # One chunk: a shard is read as a whole, and zarr would fill the last of several up, at a cost.
    chunks = tuple(max(1, size) for size in values.shape)
    options: dict[str, Any]
    if values.dtype.itemsize > 1:
        # A page is what shares a table: a row, so that each has its own; long ones are cut equally.
        page = chunks[-1]
        codec = PCodec(level=8, equal_pages_up_to=min(page, _PAGE))
        options = {"serializer": codec, "compressors": [Crc32cCodec()]}
    else:
        blosc = BloscCodec(cname="zstd", clevel=9, shuffle="noshuffle", typesize=1)
        options = {"serializer": BytesCodec(endian=None), "compressors": [blosc, Crc32cCodec()]}
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=chunks,
        dtype=values.dtype,
        # A chunk of zeros must be a file too, or a lost one would read as zeros.
        config={"write_empty_chunks": True},
        **options,
    )
    if values.size:
        array[...] = np.ascontiguousarray(values)  # PCodec would read past a view's strides


def _read(group: zarr.Group, name: str, members: set[str]) -> NDArray:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{name} is not an array")
    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    chunks = {f"{name}/c/{'/'.join(map(str, index))}" for index in np.ndindex(array.cdata_shape)}
    if lost := chunks - members:  # zarr would read zeros
        raise ValueError(f"{len(lost)} chunk(s) are missing, {min(lost)} is one")
    return np.asarray(array[...])
