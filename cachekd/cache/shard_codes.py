"""A shard's codes: its arrays as they are in the file (`cachekd.cache.arrays`), checked against each other.

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

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.arrays import Shape, damaged, pack_arrays, read_arrays, require_shape
from cachekd.cache.codec import rank_ids
from cachekd.cache.records import offsets

FORMAT = {"format": "cachekd-shard", "format_version": 1}
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


def read_codes(
    path: Path, *, sketch: bool, sha256: str | None = None, counts: Counts | None = None
) -> dict[str, NDArray]:
    """A shard's arrays as they are on the disk, checked against each other.

    Arguments and errors are `cachekd.cache.shard.read_shard`'s.
    """
    names = [*_ARRAYS, *(_SKETCH_ARRAYS if sketch else ())]
    arrays = read_arrays(path, names, FORMAT, sha256, None if counts is None else _shapes(counts, sketch))
    try:
        _check(arrays, 2**32 if counts is None else counts.vocab_size)
    except ValueError as error:
        raise damaged(path, str(error)) from None
    return arrays


def pack_codes(arrays: dict[str, NDArray]) -> bytes:
    """The file's bytes from arrays as `read_codes` gives them."""
    return pack_arrays(arrays, FORMAT)


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
        sketch, sha256, counts: as for `cachekd.cache.shard.read_shard`.

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
    keys = keys_of(old["sample_keys"])
    new = {
        "sample_offsets": offsets(sizes[wanted]).astype("<u4"),
        "sample_keys": characters_of([keys[place] for place in samples]),
        "sample_hashes": old["sample_hashes"][wanted],
        **{name: old[name][tokens] for name in ("token_ids", "k", "beyond_knee", "tail")},
        **id_arrays(old["ranked_ids"][old["topk_ranks"]][entries]),
        "topk_gaps": old["topk_gaps"][entries],
    }
    if sketch:
        new["sketch_coordinates"] = old["sketch_coordinates"][:, tokens]
        new["sketch_shift"] = old["sketch_shift"][tokens]
    return pack_codes(new), int(tokens.sum()), int(entries.sum())


def id_arrays(ids: NDArray[np.uint32]) -> dict[str, NDArray]:
    """What a shard holds of its entries' ids [E]."""
    ranked, ranks = rank_ids(ids)
    narrow = len(ranked) <= 2**16
    return {"ranked_ids": ranked.astype("<u4"), "topk_ranks": ranks.astype("<u2" if narrow else "<u4")}


def characters_of(keys: list[str]) -> NDArray[np.uint8]:
    """`sample_keys`, from the keys."""
    return np.frombuffer("\n".join(keys).encode(), dtype="u1")


def keys_of(characters: NDArray) -> list[str]:
    """The keys, from `sample_keys`.

    Raises:
        ValueError: no UTF-8.
    """
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
        samples=len(keys_of(arrays["sample_keys"])),
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
