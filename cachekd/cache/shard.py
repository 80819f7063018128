"""One shard: some samples' targets in one file of arrays (`cachekd.cache.arrays`).

Over n samples, N answer tokens, E entries, R different ids among them, and C axes of the tail sketch:

| array | dtype | shape | |
| --- | --- | --- | --- |
| sample_offsets | uint32 | n + 1 | where each sample's tokens start |
| sample_keys | uint8 | bytes | the keys in UTF-8, one per line |
| sample_hashes | uint8 | n, 16 | content hash of each sample |
| token_ids | uint32 | N | the answer tokens |
| k | uint16 | N | entries kept |
| beyond_knee | uint16 | N | k less Kneedle's k |
| tail | int16 | N | log-odds of the mass not kept (codec.encode_tail) |
| ranked_ids | uint32 | R | the ids, most frequent first |
| topk_ranks | uint16 or uint32 | E | places in ranked_ids, by descending probability |
| topk_gaps | uint16 | E | quantised logprobs (codec.encode_logprobs) |
| sketch_coordinates | int16 | C, N | in a cache with a tail sketch: SketchCodes, axis by axis |
| sketch_shift | int16 | N | the same |
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.arrays import damaged, pack_arrays, read_arrays
from cachekd.cache.codec import (
    decode_logprobs,
    decode_tail,
    encode_logprobs,
    encode_tail,
    rank_ids,
)
from cachekd.cache.records import SketchCodes, TokenTargets, offsets

_FORMAT = {"format": "cachekd-shard", "format_version": 1}
_ARRAYS = (
    "sample_offsets",
    "sample_keys",
    "sample_hashes",
    "token_ids",
    "k",
    "beyond_knee",
    "tail",
    "ranked_ids",
    "topk_ranks",
    "topk_gaps",
)
_SKETCH_ARRAYS = ("sketch_coordinates", "sketch_shift")


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
    """The shard's file. Equal shards give equal bytes.

    Args:
        step: nats per quantisation step of the kept logprobs.
    """
    targets = shard.targets
    ranked, ranks = rank_ids(targets.ids)
    arrays = {
        "sample_offsets": shard.sample_offsets.astype("<u4"),
        "sample_keys": _characters(shard.keys),
        "sample_hashes": shard.hashes,
        "token_ids": targets.token_ids.astype("<u4"),
        "k": targets.k.astype("<u2"),
        "beyond_knee": (targets.k - targets.knee).astype("<u2"),
        "tail": encode_tail(targets.tail_logmass, targets.logprobs, targets.k).astype("<i2"),
        **_ids(ranked, ranks),
        "topk_gaps": encode_logprobs(targets.logprobs, targets.k, step).astype("<u2"),
    }
    if targets.sketch is not None:
        arrays["sketch_coordinates"] = np.ascontiguousarray(targets.sketch.coordinates.T).astype("<i2")
        arrays["sketch_shift"] = targets.sketch.shift.astype("<i2")
    return pack_arrays(arrays, _FORMAT)


def read_shard(path: Path, step: float, *, sketch: bool = False, sha256: str | None = None) -> Shard:
    """Read and check a whole shard.

    Args:
        step: that it was packed with.
        sketch: whether it must have a tail sketch.
        sha256: of the file, if it is known.

    Raises:
        CachekdError: it is not a shard, or is damaged: what failed, and where.
    """
    arrays = read_arrays(path, [*_ARRAYS, *(_SKETCH_ARRAYS if sketch else ())], _FORMAT, sha256)
    try:
        return _assemble(arrays, step)
    except (ValueError, IndexError) as error:
        raise damaged(path, str(error)) from None


def cut_shard(
    path: Path, samples: Sequence[int], *, sketch: bool, sha256: str | None = None
) -> tuple[bytes, int, int]:
    """Some of a shard's samples, in a file of their own; every code as it was.

    Args:
        samples: places in the shard, ascending.
        sketch, sha256: as for `read_shard`.

    Returns:
        the file's bytes, and how many tokens and entries it has.
    """
    old = read_arrays(path, [*_ARRAYS, *(_SKETCH_ARRAYS if sketch else ())], _FORMAT, sha256)
    starts = old["sample_offsets"].astype(np.int64)
    counts = starts[1:] - starts[:-1]
    wanted = np.zeros(len(counts), bool)
    wanted[list(samples)] = True
    tokens = np.repeat(wanted, counts)
    entries = np.repeat(tokens, old["k"])
    ranked, ranks = rank_ids(old["ranked_ids"][old["topk_ranks"]][entries])
    keys = _keys(old["sample_keys"])
    new = {
        "sample_offsets": offsets(counts[wanted]).astype("<u4"),
        "sample_keys": _characters([keys[place] for place in samples]),
        "sample_hashes": old["sample_hashes"][wanted],
        **{name: old[name][tokens] for name in ("token_ids", "k", "beyond_knee", "tail")},
        **_ids(ranked, ranks),
        "topk_gaps": old["topk_gaps"][entries],
    }
    if sketch:
        new["sketch_coordinates"] = old["sketch_coordinates"][:, tokens]
        new["sketch_shift"] = old["sketch_shift"][tokens]
    return pack_arrays(new, _FORMAT), int(tokens.sum()), int(entries.sum())


def _characters(keys: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer("\n".join(keys).encode(), dtype="u1")


def _ids(ranked: NDArray[np.uint32], ranks: NDArray[np.int64]) -> dict[str, NDArray]:
    narrow = len(ranked) <= 2**16
    return {"ranked_ids": ranked.astype("<u4"), "topk_ranks": ranks.astype("<u2" if narrow else "<u4")}


def read_keys(path: Path) -> list[str]:
    """A shard's sample keys, in order, and nothing else of it.

    Raises:
        CachekdError: as `read_shard`.
    """
    return _named(path, read_arrays(path, ["sample_keys"], _FORMAT))


def read_identities(path: Path) -> tuple[list[str], NDArray[np.uint8]]:
    """A shard's sample keys and content hashes, [n, 16], and nothing else of it.

    Raises:
        CachekdError: as `read_shard`.
    """
    arrays = read_arrays(path, ["sample_keys", "sample_hashes"], _FORMAT)
    keys, hashes = _named(path, arrays), arrays["sample_hashes"]
    if hashes.shape != (len(keys), 16):
        raise damaged(path, f"sample_hashes: {hashes.shape}, expected {(len(keys), 16)}")
    return keys, hashes


def read_outline(path: Path) -> tuple[list[str], int, int]:
    """A shard's keys, and how many tokens and entries it has; the values themselves are not decoded.

    Raises:
        CachekdError: as `read_shard`.
    """
    arrays = read_arrays(path, ["sample_keys", "k"], _FORMAT)
    return _named(path, arrays), len(arrays["k"]), int(arrays["k"].sum(dtype=np.int64))


def samples_sha256(shard: Shard) -> str:
    """Over keys and content hashes: which samples these are, whatever was said of them."""
    return hashlib.sha256(_characters(shard.keys).tobytes() + shard.hashes.tobytes()).hexdigest()


def _named(path: Path, arrays: dict[str, NDArray]) -> list[str]:
    try:
        return _keys(arrays["sample_keys"])
    except ValueError as error:
        raise damaged(path, str(error)) from None


def _keys(characters: NDArray) -> list[str]:
    return characters.tobytes().decode().split("\n")


def _assemble(arrays: dict[str, NDArray], step: float) -> Shard:
    starts, k = arrays["sample_offsets"].astype(np.int64), arrays["k"]
    keys = _keys(arrays["sample_keys"])
    tokens, entries = len(arrays["token_ids"]), int(k.sum(dtype=np.int64))
    lengths = {
        "sample_offsets": (len(starts), len(keys) + 1),
        "last sample_offset": (int(starts[-1]), tokens),
        "sample_hashes": (arrays["sample_hashes"].shape, (len(keys), 16)),
        "k": (len(k), tokens),
        "beyond_knee": (len(arrays["beyond_knee"]), tokens),
        "tail": (len(arrays["tail"]), tokens),
        "topk_ranks": (len(arrays["topk_ranks"]), entries),
        "topk_gaps": (len(arrays["topk_gaps"]), entries),
    }
    sketch = None
    if "sketch_shift" in arrays:
        coordinates = arrays["sketch_coordinates"]
        lengths |= {
            "sketch_coordinates": (coordinates.shape[1:], (tokens,)),
            "sketch_shift": (len(arrays["sketch_shift"]), tokens),
        }
        sketch = SketchCodes(np.ascontiguousarray(coordinates.T), arrays["sketch_shift"])
    for name, (found, expected) in lengths.items():
        if found != expected:
            raise ValueError(f"{name}: {found}, expected {expected}")
    tail, kept = decode_tail(arrays["tail"])
    logprobs = decode_logprobs(arrays["topk_gaps"], k, kept, step)
    targets = TokenTargets(
        token_ids=arrays["token_ids"],
        k=k,
        knee=k - arrays["beyond_knee"],
        ids=arrays["ranked_ids"][arrays["topk_ranks"]],
        logprobs=logprobs,
        tail_logmass=tail,
        sketch=sketch,
    )
    return Shard(keys, arrays["sample_hashes"], starts, targets)


def make_shard(samples: list[tuple[str, bytes, int]], targets: TokenTargets) -> Shard:
    """From (key, 16-byte hash, number of tokens) of every sample, and the targets of all."""
    return Shard(
        keys=[key for key, _, _ in samples],
        hashes=np.frombuffer(b"".join(content for _, content, _ in samples), dtype="u1").reshape(-1, 16),
        sample_offsets=offsets(np.array([tokens for _, _, tokens in samples])),
        targets=targets,
    )
