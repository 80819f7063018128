"""A shard: its samples' values, its arrays on the disk, its names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.codec import (
    TAIL_STEP,
    decode_logprobs,
    decode_tail,
    encode_logprobs,
    encode_tail,
    rank_ids,
)
from cachekd.cache.container import damaged, pack_arrays, read_arrays
from cachekd.cache.shard_rules import NARROW, RULES, SKETCH_RULES, Counts, keys_of, require_fitting
from cachekd.cache.sparse_logits import SketchCodes, TokenTargets, offsets
from cachekd.config.fields import KEPT

FORMAT = {"format": "cachekd-shard", "format_version": 1}
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


def make_shard(samples: list[tuple[str, bytes, int]], targets: TokenTargets) -> Shard:
    """Make a shard of (key, 16-byte hash, number of tokens) of every sample, and the targets of all."""
    return Shard(
        keys=[key for key, _, _ in samples],
        hashes=np.frombuffer(b"".join(content for _, content, _ in samples), dtype="u1").reshape(-1, 16),
        sample_offsets=offsets(np.array([tokens for _, _, tokens in samples])),
        targets=targets,
    )


def samples_sha256(shard: Shard) -> str:
    """Over keys and content hashes: which samples these are, whatever was said of them."""
    return hashlib.sha256(characters_of(shard.keys).tobytes() + shard.hashes.tobytes()).hexdigest()


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
        "tail": encode_tail(targets.tail_logmass, targets.logprobs, targets.k).astype("<i2"),
        "topk_gaps": encode_logprobs(targets.logprobs, targets.k, step).astype("<u2"),
    }
    return pack_codes({**arrays, **kept_arrays(targets), **sketch_arrays(targets.sketch)})


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
    """Decode the arrays of `read_codes`.

    Args:
        step: that the logprobs were coded with.
    """
    k, (tail, kept) = arrays["k"], decode_tail(arrays["tail"])
    return TokenTargets(
        token_ids=arrays["token_ids"],
        k=k,
        knee=k - arrays["beyond_knee"],
        ids=arrays["ranked_ids"][arrays["topk_ranks"]],
        logprobs=decode_logprobs(arrays["topk_gaps"], k, kept, step),
        tail_logmass=tail,
        sketch=sketch_of(arrays),
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


def read_codes(
    path: Path, *, sketch: bool, sha256: str | None = None, counts: Counts | None = None
) -> dict[str, NDArray]:
    """A shard's arrays as they are on the disk, checked against each other.

    Arguments and errors are `cachekd.cache.shard.read_shard`'s.
    """
    rules = {**RULES, **(SKETCH_RULES if sketch else {})}
    sizes = {"vocab_size": 2**32, "top_k": KEPT} if counts is None else counts.sizes
    arrays = read_arrays(path, list(rules), FORMAT, sha256, rules, sizes)
    try:
        require_fitting(arrays)
    except ValueError as error:
        raise damaged(path, str(error)) from None
    return arrays


def pack_codes(arrays: dict[str, NDArray]) -> bytes:
    """The file's bytes from arrays as `read_codes` gives them."""
    return pack_arrays(arrays, FORMAT)


def cut_codes(old: Mapping[str, NDArray], samples: Sequence[int]) -> tuple[bytes, int, int]:
    """Some of a shard's samples, in a file of their own; every code as it was.

    Args:
        old: as `read_codes` gives them.
        samples: places in the shard, ascending.

    Returns:
        the file's bytes, and how many tokens and entries it has.
    """
    starts = old["sample_offsets"].astype(np.int64)
    sizes = starts[1:] - starts[:-1]
    wanted = np.zeros(len(sizes), bool)
    wanted[list(samples)] = True
    tokens = np.repeat(wanted, sizes)
    entries = np.repeat(tokens, old["k"])
    keys = keys_of(old["sample_keys"])
    new = {
        "sample_offsets": offsets(sizes[wanted]).astype("<u4"),
        "sample_keys": characters_of([keys[place] for place in samples]),
        "sample_hashes": old["sample_hashes"][wanted],
        **{name: old[name][tokens] for name in ("token_ids", "k", "beyond_knee", "tail")},
        **id_arrays(old["ranked_ids"][old["topk_ranks"]][entries]),
        "topk_gaps": old["topk_gaps"][entries],
    }
    if "sketch_shift" in old:
        new["sketch_coordinates"] = old["sketch_coordinates"][:, tokens]
        new["sketch_shift"] = old["sketch_shift"][tokens]
    return pack_codes(new), int(tokens.sum()), int(entries.sum())


def kept_arrays(targets: TokenTargets) -> dict[str, NDArray]:
    """What a shard holds of how many entries tokens have, and of which ids."""
    beyond = (targets.k - targets.knee).astype("<u2")
    return {"k": targets.k.astype("<u2"), "beyond_knee": beyond, **id_arrays(targets.ids)}


def sketch_arrays(codes: SketchCodes | None) -> dict[str, NDArray]:
    """What a shard holds of its tokens' sketch codes, axis by axis; nothing without a tail sketch."""
    if codes is None:
        return {}
    coordinates = np.ascontiguousarray(codes.coordinates.T).astype("<i2")
    return {"sketch_coordinates": coordinates, "sketch_shift": codes.shift.astype("<i2")}


def sketch_of(arrays: Mapping[str, NDArray]) -> SketchCodes | None:
    """The inverse of `sketch_arrays`."""
    if "sketch_shift" not in arrays:
        return None
    return SketchCodes(np.ascontiguousarray(arrays["sketch_coordinates"].T), arrays["sketch_shift"])


def id_arrays(ids: NDArray[np.uint32]) -> dict[str, NDArray]:
    """What a shard holds of its entries' ids [E]."""
    ranked, ranks = rank_ids(ids)
    narrow = len(ranked) <= NARROW
    return {"ranked_ids": ranked.astype("<u4"), "topk_ranks": ranks.astype("<u2" if narrow else "<u4")}


def characters_of(keys: list[str]) -> NDArray[np.uint8]:
    """Write keys as the array `sample_keys`."""
    return np.frombuffer("\n".join(keys).encode(), dtype="u1")


def read_keys(path: Path) -> list[str]:
    """A shard's sample keys, in order, and nothing else of it.

    Raises:
        CachekdError: as `read_shard`.
    """
    return _keys(path, read_arrays(path, ["sample_keys"], FORMAT, rules=RULES))


def read_identities(path: Path) -> tuple[list[str], NDArray[np.uint8]]:
    """A shard's sample keys and content hashes, [n, 16], and nothing else of it.

    Raises:
        CachekdError: as `read_shard`.
    """
    arrays = read_arrays(path, ["sample_keys", "sample_hashes"], FORMAT, rules=RULES)
    keys, hashes = _keys(path, arrays), arrays["sample_hashes"]
    if len(hashes) != len(keys):
        raise damaged(path, f"{len(keys):,} keys, expected {len(hashes):,}")
    return keys, hashes


def read_keys_and_counts(path: Path) -> tuple[list[str], int, int]:
    """A shard's keys, and how many tokens and entries it has; the values themselves are not decoded.

    Raises:
        CachekdError: as `read_shard`.
    """
    arrays = read_arrays(path, ["sample_keys", "k"], FORMAT, rules=RULES)
    return _keys(path, arrays), len(arrays["k"]), int(arrays["k"].sum(dtype=np.int64))


def _keys(path: Path, arrays: dict[str, NDArray]) -> list[str]:
    try:
        return keys_of(arrays["sample_keys"])
    except ValueError as error:
        raise damaged(path, str(error)) from None
