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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.arrays import Shape, damaged, pack_arrays, read_arrays, require_shape
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


class Counts(NamedTuple):
    """What a shard holds, as the manifest has it.

    Attributes:
        axes: of its tail sketch; None without one.
        vocab_size: ids are below it.
    """

    samples: int
    tokens: int
    entries: int
    axes: int | None = None
    vocab_size: int = 2**32


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
        **id_arrays(ranked, ranks),
        "topk_gaps": encode_logprobs(targets.logprobs, targets.k, step).astype("<u2"),
    }
    if targets.sketch is not None:
        arrays["sketch_coordinates"] = np.ascontiguousarray(targets.sketch.coordinates.T).astype("<i2")
        arrays["sketch_shift"] = targets.sketch.shift.astype("<i2")
    return pack_arrays(arrays, _FORMAT)


def read_shard(
    path: Path, step: float, *, sketch: bool = False, sha256: str | None = None, counts: Counts | None = None
) -> Shard:
    """Read and check a whole shard.

    Args:
        step: that it was packed with.
        sketch: whether it must have a tail sketch.
        sha256: of the file, if it is known.
        counts: that it must have, if they are known: compared before anything is decoded.

    Raises:
        CachekdError: it is not a shard, or is damaged: what failed, and where.
    """
    arrays = read_codes(path, sketch=sketch, sha256=sha256, counts=counts)
    starts = arrays["sample_offsets"].astype(np.int64)
    targets = decode_targets(arrays, step)
    return Shard(_keys(arrays["sample_keys"]), arrays["sample_hashes"], starts, targets)


def read_codes(
    path: Path, *, sketch: bool, sha256: str | None = None, counts: Counts | None = None
) -> dict[str, NDArray]:
    """A shard's arrays as they are on the disk, checked against each other; arguments and errors as for
    `read_shard`."""
    names = [*_ARRAYS, *(_SKETCH_ARRAYS if sketch else ())]
    arrays = read_arrays(path, names, _FORMAT, sha256, None if counts is None else _shapes(counts, sketch))
    try:
        _check(arrays, 2**32 if counts is None else counts.vocab_size)
    except ValueError as error:
        raise damaged(path, str(error)) from None
    return arrays


def cut_shard(
    path: Path,
    samples: Sequence[int],
    *,
    sketch: bool,
    sha256: str | None = None,
    counts: Counts | None = None,
) -> tuple[bytes, int, int]:
    """Some of a shard's samples, in a file of their own; every code as it was.

    Args:
        samples: places in the shard, ascending.
        sketch, sha256, counts: as for `read_shard`.

    Returns:
        the file's bytes, and how many tokens and entries it has.
    """
    old = read_codes(path, sketch=sketch, sha256=sha256, counts=counts)
    starts = old["sample_offsets"].astype(np.int64)
    sizes = starts[1:] - starts[:-1]
    wanted = np.zeros(len(sizes), bool)
    wanted[list(samples)] = True
    tokens = np.repeat(wanted, sizes)
    entries = np.repeat(tokens, old["k"])
    ranked, ranks = rank_ids(old["ranked_ids"][old["topk_ranks"]][entries])
    keys = _keys(old["sample_keys"])
    new = {
        "sample_offsets": offsets(sizes[wanted]).astype("<u4"),
        "sample_keys": _characters([keys[place] for place in samples]),
        "sample_hashes": old["sample_hashes"][wanted],
        **{name: old[name][tokens] for name in ("token_ids", "k", "beyond_knee", "tail")},
        **id_arrays(ranked, ranks),
        "topk_gaps": old["topk_gaps"][entries],
    }
    if sketch:
        new["sketch_coordinates"] = old["sketch_coordinates"][:, tokens]
        new["sketch_shift"] = old["sketch_shift"][tokens]
    return pack_codes(new), int(tokens.sum()), int(entries.sum())


def pack_codes(arrays: dict[str, NDArray]) -> bytes:
    """The file's bytes from arrays as `read_codes` gives them."""
    return pack_arrays(arrays, _FORMAT)


def _characters(keys: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer("\n".join(keys).encode(), dtype="u1")


def id_arrays(ranked: NDArray[np.uint32], ranks: NDArray[np.int64]) -> dict[str, NDArray]:
    """What a shard holds of `rank_ids`' results."""
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


def _shapes(counts: Counts, sketch: bool) -> dict[str, Shape]:
    """That the arrays must have; the lengths of `sample_keys` and `ranked_ids` follow from nothing."""
    samples, tokens, entries, axes, _ = counts
    shapes: dict[str, Shape] = {
        "sample_offsets": (samples + 1,),
        "sample_hashes": (samples, 16),
        **dict.fromkeys(("token_ids", "k", "beyond_knee", "tail"), (tokens,)),
        **dict.fromkeys(("topk_ranks", "topk_gaps"), (entries,)),
    }
    if sketch:
        shapes |= {"sketch_coordinates": (axes, tokens), "sketch_shift": (tokens,)}
    return shapes


def _check(arrays: dict[str, NDArray], vocab_size: int) -> None:
    """Do they fit together? Raises ValueError where not."""
    starts, k = arrays["sample_offsets"].astype(np.int64), arrays["k"]
    counts = Counts(
        samples=len(_keys(arrays["sample_keys"])),
        tokens=len(arrays["token_ids"]),
        entries=int(k.sum(dtype=np.int64)),
    )
    for name, expected in _shapes(counts, "sketch_shift" in arrays).items():
        require_shape(name, arrays[name].shape, expected)
    if starts[0] != 0 or starts[-1] != counts.tokens or (np.diff(starts) < 0).any():
        raise ValueError(f"sample_offsets do not lead from 0 to {counts.tokens}")
    if (arrays["beyond_knee"] > k).any():
        raise ValueError("a token's knee is negative")
    if counts.entries and int(arrays["topk_ranks"].max()) >= len(arrays["ranked_ids"]):
        raise ValueError("topk_ranks lead beyond ranked_ids")
    if len(arrays["ranked_ids"]) and int(arrays["ranked_ids"].max()) >= vocab_size:
        raise ValueError(f"an id is beyond the vocabulary of {vocab_size:,}")


def decode_targets(arrays: dict[str, NDArray], step: float) -> TokenTargets:
    """What the arrays of `read_codes` say.

    Args:
        step: that the logprobs were coded with.
    """
    k, sketch = arrays["k"], None
    if "sketch_shift" in arrays:
        coordinates = np.ascontiguousarray(arrays["sketch_coordinates"].T)
        sketch = SketchCodes(coordinates, arrays["sketch_shift"])
    tail, kept = decode_tail(arrays["tail"])
    return TokenTargets(
        token_ids=arrays["token_ids"],
        k=k,
        knee=k - arrays["beyond_knee"],
        ids=arrays["ranked_ids"][arrays["topk_ranks"]],
        logprobs=decode_logprobs(arrays["topk_gaps"], k, kept, step),
        tail_logmass=tail,
        sketch=sketch,
    )


def make_shard(samples: list[tuple[str, bytes, int]], targets: TokenTargets) -> Shard:
    """From (key, 16-byte hash, number of tokens) of every sample, and the targets of all."""
    return Shard(
        keys=[key for key, _, _ in samples],
        hashes=np.frombuffer(b"".join(content for _, content, _ in samples), dtype="u1").reshape(-1, 16),
        sample_offsets=offsets(np.array([tokens for _, _, tokens in samples])),
        targets=targets,
    )
