"""One shard: a plain Zarr v3 group in one stored zip file, the same bytes for the same content.

Any Zarr reader opens it. Arrays, over n samples, N answer tokens and E entries:

| array | dtype | shape | |
| --- | --- | --- | --- |
| sample_offsets | uint32 | n + 1 | where each sample's tokens start |
| sample_keys | uint8 | bytes | the keys in UTF-8, one per line |
| sample_hashes | uint8 | n, 16 | content hash of each sample |
| token_ids | uint32 | N | the answer tokens |
| k, knee | uint16 | N | entries kept; Kneedle's k |
| tail | uint8 | N | log mass not kept (codec.encode_tail) |
| topk_ids | uint32 | E | by descending probability |
| topk_gaps | uint16 | E | quantised logprobs (codec.encode_logprobs) |
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore, ZipStore

from cachekd.cache.codec import decode_logprobs, decode_tail, encode_logprobs, encode_tail
from cachekd.cache.records import TokenTargets, offsets
from cachekd.errors import CachekdError

CHUNK = 128 * 1024
_FORMAT = {"format": "cachekd-shard", "format_version": 1}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold


@dataclass(frozen=True)
class Shard:
    """A shard in memory.

    Attributes:
        keys: n sample keys.
        hashes: [n, 16] uint8.
        sample_offsets: [n + 1] int64 into the tokens.
        targets: all N tokens.
    """

    keys: list[str]
    hashes: NDArray[np.uint8]
    sample_offsets: NDArray[np.int64]
    targets: TokenTargets


def pack_shard(shard: Shard, step: float) -> bytes:
    """The shard's zip file. Equal shards give equal bytes.

    Args:
        step: nats per quantisation step.
    """
    targets = shard.targets
    arrays = {
        "sample_offsets": shard.sample_offsets.astype("<u4"),
        "sample_keys": np.frombuffer("\n".join(shard.keys).encode(), dtype="u1"),
        "sample_hashes": shard.hashes,
        "token_ids": targets.token_ids.astype("<u4"),
        "k": targets.k.astype("<u2"),
        "knee": targets.knee.astype("<u2"),
        "tail": encode_tail(targets.tail_logmass),
        "topk_ids": targets.ids.astype("<u4"),
        "topk_gaps": encode_logprobs(targets.logprobs, targets.k, step).astype("<u2"),
    }
    members: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(members), attributes=_FORMAT)
    for name, values in arrays.items():
        _write_array(group, name, values)
    return _zip({name: buffer.to_bytes() for name, buffer in members.items()})


def read_shard(path: Path, step: float) -> Shard:
    """Read and check a whole shard.

    Raises:
        CachekdError: it is not a shard, or is damaged: what failed, and where.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
        with ZipStore(path, mode="r") as store:
            group = zarr.open_group(store, mode="r")
            if dict(group.attrs) != _FORMAT:
                raise ValueError(f"attributes {dict(group.attrs)}, expected {_FORMAT}")
            arrays = {name: _read_array(group, name, members) for name in _ARRAYS}
        return _assemble(arrays, step)
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, EOFError) as error:
        raise CachekdError(
            "the shard is damaged",
            where=str(path),
            found=f"{type(error).__name__}: {error}",
            fix="fetch the shard again, or run `cachekd dump` again into a new folder",
        ) from None


_ARRAYS = (
    "sample_offsets",
    "sample_keys",
    "sample_hashes",
    "token_ids",
    "k",
    "knee",
    "tail",
    "topk_ids",
    "topk_gaps",
)


def _write_array(group: zarr.Group, name: str, values: NDArray) -> None:
    chunk = max(1, min(CHUNK, len(values)))
    blosc = BloscCodec(
        cname="zstd",
        clevel=1,
        shuffle="shuffle",
        typesize=values.dtype.itemsize,
        # The automatic block size costs 5 % of the bytes.
        blocksize=chunk * values.itemsize * int(np.prod(values.shape[1:], dtype=int)),
    )
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=(chunk, *values.shape[1:]),
        dtype=values.dtype,
        serializer=BytesCodec(endian="little" if values.dtype.itemsize > 1 else None),
        compressors=[blosc, Crc32cCodec()],
        # A chunk of zeros must be a file too, or a lost one would read as zeros.
        config={"write_empty_chunks": True},
    )
    if values.size:
        array[...] = values


def _read_array(group: zarr.Group, name: str, members: set[str]) -> NDArray:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{name} is not an array")
    chunks = {f"{name}/c/{'/'.join(map(str, index))}" for index in np.ndindex(array.cdata_shape)}
    if lost := chunks - members:  # zarr would read zeros
        raise ValueError(f"{len(lost)} chunk(s) are missing, {min(lost)} is one")
    return np.asarray(array[...])


def _assemble(arrays: dict[str, NDArray], step: float) -> Shard:
    starts, k = arrays["sample_offsets"].astype(np.int64), arrays["k"]
    keys = arrays["sample_keys"].tobytes().decode().split("\n")
    tokens, entries = len(arrays["token_ids"]), int(k.sum(dtype=np.int64))
    lengths = {
        "sample_offsets": (len(starts), len(keys) + 1),
        "last sample_offset": (int(starts[-1]), tokens),
        "sample_hashes": (arrays["sample_hashes"].shape, (len(keys), 16)),
        "k": (len(k), tokens),
        "knee": (len(arrays["knee"]), tokens),
        "tail": (len(arrays["tail"]), tokens),
        "topk_ids": (len(arrays["topk_ids"]), entries),
        "topk_gaps": (len(arrays["topk_gaps"]), entries),
    }
    for name, (found, expected) in lengths.items():
        if found != expected:
            raise ValueError(f"{name}: {found}, expected {expected}")
    tail = decode_tail(arrays["tail"])
    logprobs = decode_logprobs(arrays["topk_gaps"], k, tail, step)
    targets = TokenTargets(arrays["token_ids"], k, arrays["knee"], arrays["topk_ids"], logprobs, tail)
    return Shard(keys, arrays["sample_hashes"], starts, targets)


def _zip(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), members[name])
    return stream.getvalue()


def make_shard(samples: list[tuple[str, bytes, TokenTargets]]) -> Shard:
    """Put (key, 16-byte hash, targets) of samples together."""
    return Shard(
        keys=[key for key, _, _ in samples],
        hashes=np.frombuffer(b"".join(content for _, content, _ in samples), dtype="u1").reshape(-1, 16),
        sample_offsets=offsets(np.array([len(targets) for _, _, targets in samples])),
        targets=TokenTargets.concatenate([targets for _, _, targets in samples]),
    )
