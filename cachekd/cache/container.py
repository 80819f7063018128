"""Named arrays in one file: a plain Zarr v3 group in a stored zip, the same bytes for the same content.

Any Zarr reader that has numcodecs with pcodec opens it. Numbers go through PCodec, which stays within a few
percent of their order-0 entropy where zstd needs a quarter to a half more
(docs/explanation/what-the-cache-keeps.md); bytes go through zstd. Every chunk ends with its crc32c.

Zarr writes them. Reading takes another way, as a cache is often somebody else's: shapes and codecs are
checked before a byte is decoded, and every chunk is decoded into memory of the size that was checked. Zarr
itself would take any codec that happens to be installed, and allocate whatever shape is claimed.
"""

from __future__ import annotations

import functools
import hashlib
import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import zarr
from numcodecs.blosc import Blosc
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray
from pcodec import standalone  # type: ignore[import-untyped]
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.codecs.numcodecs import PCodec
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from cachekd.atomic import read_plain, require_plain
from cachekd.cache.array_rules import (
    ArrayMetadata,
    ArrayRule,
    read_array,
    read_group,
    require_form,
    require_values,
)
from cachekd.cache.sealed import RESTORE
from cachekd.errors import CachekdError

MOST_DECODED = 2**33  # bytes that one file's arrays may take
MOST_DIRECTORY = 2**16  # bytes of a zip's list of members; ours have some 2,000
_FREE = 2**24  # bytes that any file may decode to
_MOST_RATIO = 2**12  # decoded over stored bytes, beyond that
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold
_PAGE = 2**18  # PCodec's own limit for numbers that share a table


def pack_arrays(arrays: dict[str, NDArray], attributes: dict[str, Any]) -> bytes:
    """Pack arrays into the bytes of a file.

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
    content = stream.getvalue()
    try:
        require_plausible(sum(values.nbytes for values in arrays.values()), len(content))
    except ValueError as error:  # what nobody would read must not be written
        raise CachekdError(
            "a file of the cache would be too large", found=str(error), fix="fewer samples: --shard-samples"
        ) from None
    return content


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


def read_arrays(
    path: Path,
    names: Sequence[str],
    attributes: dict[str, Any],
    sha256: str | None = None,
    rules: Mapping[str, ArrayRule] = MappingProxyType({}),
    sizes: Mapping[str, int | None] = MappingProxyType({}),
) -> dict[str, NDArray]:
    """Read and check whole arrays. Memory: theirs, and the file's own where `sha256` is given.

    Args:
        names: those that must be there.
        attributes: that the group must have, among others.
        sha256: of the file. Every chunk has its own checksum, but not the bytes between them; without it only
            what is asked for is read from the disk.
        rules: what those that it names must be; types and shapes are compared before anything is decoded.
        sizes: that the rules name, as far as they are known.

    Raises:
        CachekdError: the file is not what it should be, or is damaged: what failed, and where.
    """
    try:
        with _open(path, sha256) as archive:
            size, members = _members(archive, names)
        found = read_group(members["zarr.json"])
        if (some := {name: found.get(name) for name in attributes}) != attributes:
            raise ValueError(f"attributes {str(some)[:200]}, expected {attributes}")
        arrays = {name: read_array(name, members[f"{name}/zarr.json"]) for name in names}
        rules = {name: rules[name] for name in names if name in rules}
        known = require_form(rules, arrays, sizes)
        require_plausible(sum(array.nbytes for array in arrays.values()), size)
        values = {name: _read(name, array, members) for name, array in arrays.items()}
        require_values(rules, values, known)
        return values
    except _FAULTS as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None


# What zipfile, json, the codecs and the checks above raise at bytes that are not what they should be.
_FAULTS = (
    *(OSError, KeyError, ValueError, RuntimeError, TypeError, EOFError, AttributeError, OverflowError),
    *(zipfile.BadZipFile, struct.error),
)


def _open(path: Path, sha256: str | None) -> zipfile.ZipFile:
    if sha256 is None:
        require_plain(path)
        with path.open("rb") as stream:
            _require_short_directory(stream)
        return zipfile.ZipFile(path)
    content = read_plain(path, MOST_DECODED)  # stored, it is smaller yet
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"sha256 {found}, expected {sha256}")
    _require_short_directory(io.BytesIO(content))
    return zipfile.ZipFile(io.BytesIO(content))


def _require_short_directory(stream: IO[bytes]) -> None:
    """zipfile makes an object of every member that is listed, before anybody can look; of 500 bytes or so."""
    end = zipfile._EndRecData(stream)  # type: ignore[attr-defined]  # by which zipfile itself goes; zip64 too
    size = end[zipfile._ECD_SIZE] if end else 0  # type: ignore[attr-defined]
    if size > MOST_DIRECTORY:
        raise ValueError(f"a list of members of {size:,} bytes, expected {MOST_DIRECTORY:,} at most")


def _members(archive: zipfile.ZipFile, names: Sequence[str]) -> tuple[int, dict[str, bytes]]:
    """The archive's bytes, and the members of the group and the named arrays, each of which zipfile compares
    with its crc32. What else is there is left alone."""
    stream = archive.fp
    assert stream is not None  # open
    size = stream.seek(0, io.SEEK_END)
    wanted = {"zarr.json"}.union(*({f"{name}/zarr.json", f"{name}/c/0", f"{name}/c/0/0"} for name in names))
    infos = [info for info in archive.infolist() if info.filename in wanted]
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{info.filename} is compressed, and may be a zip bomb")
    if len({info.filename for info in infos}) != len(infos):
        raise ValueError("a member is there twice")
    if sum(info.file_size for info in infos) > size:
        raise ValueError("members overlap")
    whole = stream.getvalue() if isinstance(stream, io.BytesIO) else None
    read = archive.read if whole is None else functools.partial(_stored, whole)
    return size, {info.filename: read(info) for info in infos}


def _stored(content: bytes, info: zipfile.ZipInfo) -> bytes:
    """A member as `ZipFile.read` gives it, in a tenth of the time; a small shard has 21 of little else."""
    start = info.header_offset
    signature, name, extra = struct.unpack_from("<4s22xHH", content, start)
    first = start + 30 + name + extra
    body = content[first : first + info.file_size]
    there = signature == b"PK\3\4" and content[start + 30 : start + 30 + name] == info.orig_filename.encode()
    if not there or info.flag_bits & 1 or len(body) != info.file_size or zlib.crc32(body) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename} is not what the list of members says")
    return body


def _read(name: str, array: ArrayMetadata, members: Mapping[str, bytes]) -> NDArray:
    values = np.empty(array.shape, array.dtype)
    if not values.size:
        return values
    key = f"{name}/c/{'/'.join('0' * values.ndim)}"
    if key not in members:  # zarr would read zeros
        raise ValueError(f"1 chunk(s) are missing, {key} is one")
    body = bytes(CRC32C().decode(members[key]))
    if array.dtype.itemsize > 1:
        progress = standalone.simple_decompress_into(body, values.reshape(-1))
        if progress.n_processed != values.size or not progress.finished:
            raise ValueError(f"{key} does not hold {values.size:,} numbers")
    else:
        if int.from_bytes(body[4:8], "little") != values.nbytes:  # blosc fills less without a word
            raise ValueError(f"{key} does not hold {values.size:,} bytes")
        Blosc().decode(body, out=values)
    return values


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


def damaged(path: Path, found: str) -> CachekdError:
    """The error for a file of a cache that cannot be used."""
    return CachekdError(
        f"the {'shard' if path.parent.name == 'shards' else 'file'} is damaged",
        where=str(path),
        found=found,
        fix=RESTORE,
    )
