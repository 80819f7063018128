"""A shard: its samples' values, its arrays on the disk, its names alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.arrays import damaged
from cachekd.cache.codec import TAIL_STEP, decode_logprobs, decode_tail, encode_logprobs, encode_tail
from cachekd.cache.records import SketchCodes, TokenTargets, offsets
from cachekd.cache.shard_codes import Counts, characters_of, id_arrays, keys_of, pack_codes, read_codes

_WIDEST_GAP = 2**16 - 1  # steps
_NO_MASS = 64.0  # nats below a token's largest logprob: of no id, however many there are
_FLOAT = 1e-3  # nats; what float32 leaves


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
    arrays = {
        "sample_offsets": shard.sample_offsets.astype("<u4"),
        "sample_keys": characters_of(shard.keys),
        "sample_hashes": shard.hashes,
        "token_ids": targets.token_ids.astype("<u4"),
        "k": targets.k.astype("<u2"),
        "beyond_knee": (targets.k - targets.knee).astype("<u2"),
        "tail": encode_tail(targets.tail_logmass, targets.logprobs, targets.k).astype("<i2"),
        **id_arrays(targets.ids),
        "topk_gaps": encode_logprobs(targets.logprobs, targets.k, step).astype("<u2"),
    }
    if targets.sketch is not None:
        arrays["sketch_coordinates"] = np.ascontiguousarray(targets.sketch.coordinates.T).astype("<i2")
        arrays["sketch_shift"] = targets.sketch.shift.astype("<i2")
    return pack_codes(arrays)


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
    if counts is not None and (wrong := _wrong_masses(arrays["topk_gaps"], targets, step, counts)):
        raise damaged(path, f"logprobs and tail of {wrong:,} tokens do not add up")
    return Shard(keys_of(arrays["sample_keys"]), arrays["sample_hashes"], starts, targets)


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


def _wrong_masses(gaps: NDArray, targets: TokenTargets, step: float, counts: Counts) -> int:
    """How many tokens have logprobs and a tail that no distribution has, however it was rounded.

    What is kept is said twice: by the gaps, and by the tail. Decoding moves the one to the other.
    """
    if step * _WIDEST_GAP < _NO_MASS:  # so that gaps may be cut where there still is some
        return 0
    first = offsets(targets.k)[:-1]
    moved = targets.logprobs[first] + step * gaps[first]
    return int((np.abs(moved) > step / 2 + (1 + counts.recompressed) * TAIL_STEP / 2 + _FLOAT).sum())


def make_shard(samples: list[tuple[str, bytes, int]], targets: TokenTargets) -> Shard:
    """From (key, 16-byte hash, number of tokens) of every sample, and the targets of all."""
    return Shard(
        keys=[key for key, _, _ in samples],
        hashes=np.frombuffer(b"".join(content for _, content, _ in samples), dtype="u1").reshape(-1, 16),
        sample_offsets=offsets(np.array([tokens for _, _, tokens in samples])),
        targets=targets,
    )


def samples_sha256(shard: Shard) -> str:
    """Over keys and content hashes: which samples these are, whatever was said of them."""
    return hashlib.sha256(characters_of(shard.keys).tobytes() + shard.hashes.tobytes()).hexdigest()
