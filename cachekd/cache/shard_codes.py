"""A shard's codes: its arrays as they are in the file (`cachekd.cache.arrays`), checked with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.array_rules import MOST_CODE, ArrayRule
from cachekd.cache.arrays import damaged, pack_arrays, read_arrays
from cachekd.cache.codec import rank_ids
from cachekd.cache.records import offsets
from cachekd.config.fields import KEPT

FORMAT = {"format": "cachekd-shard", "format_version": 1}
# Over n samples, N answer tokens, E entries, and R (`ranked`) different ids among them.
RULES = {
    # Where each sample's tokens start; the last one: where they end. No sample is without any.
    "sample_offsets": ArrayRule(("uint32",), ("starts",), most="tokens", order="ascending"),
    # The keys in UTF-8, one per line.
    "sample_keys": ArrayRule(("uint8",), ("characters",)),
    # Content hash of each sample.
    "sample_hashes": ArrayRule(("uint8",), ("samples", 16)),
    # The answer tokens.
    "token_ids": ArrayRule(("uint32",), ("tokens",), below="vocab_size"),
    # Entries kept.
    "k": ArrayRule(("uint16",), ("tokens",), least=1, most="top_k"),
    # k less Kneedle's k.
    "beyond_knee": ArrayRule(("uint16",), ("tokens",)),
    # Log-odds of the mass not kept (codec.encode_tail).
    "tail": ArrayRule(("int16",), ("tokens",)),
    # The ids, most frequent first.
    "ranked_ids": ArrayRule(("uint32",), ("ranked",), below="vocab_size", order="unique"),
    # Places in ranked_ids, by descending probability; uint16 where that will do.
    "topk_ranks": ArrayRule(("uint16", "uint32"), ("entries",), below="ranked"),
    # Quantised logprobs (codec.encode_logprobs).
    "topk_gaps": ArrayRule(("uint16",), ("entries",)),
}
# In a cache with a tail sketch besides: SketchCodes, axis by axis.
SKETCH_RULES = {
    "sketch_coordinates": ArrayRule(("int16",), ("axes", "tokens"), least=-MOST_CODE),
    "sketch_shift": ArrayRule(("int16",), ("tokens",), least=-MOST_CODE),
}
_NARROW = 2**16  # ids whose places fit into 16 bits
_SORTED = 2**16  # entries at a time: what stays in a CPU's cache


class Counts(NamedTuple):
    """What a shard holds, as the manifest has it.

    Attributes:
        axes: of its tail sketch; None without one.
        vocab_size: ids are below it.
        top_k: no token has more entries.
        recompressed: how often entries may have been cut off, at most: each time odds were rounded anew.
    """

    samples: int
    tokens: int
    entries: int
    axes: int | None = None
    vocab_size: int = 2**32
    top_k: int = KEPT
    recompressed: int = 0

    @property
    def sizes(self) -> dict[str, int | None]:
        """By the names that the rules have."""
        return {**self._asdict(), "starts": self.samples + 1}


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
        _check(arrays)
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


def id_arrays(ids: NDArray[np.uint32]) -> dict[str, NDArray]:
    """What a shard holds of its entries' ids [E]."""
    ranked, ranks = rank_ids(ids)
    narrow = len(ranked) <= _NARROW
    return {"ranked_ids": ranked.astype("<u4"), "topk_ranks": ranks.astype("<u2" if narrow else "<u4")}


def characters_of(keys: list[str]) -> NDArray[np.uint8]:
    """`sample_keys`, from the keys."""
    return np.frombuffer("\n".join(keys).encode(), dtype="u1")


def keys_of(characters: NDArray) -> list[str]:
    """The keys, from `sample_keys`.

    Raises:
        ValueError: no UTF-8, or one is there twice.
    """
    keys = characters.tobytes().decode().split("\n")
    if len(set(keys)) != len(keys):
        raise ValueError("a key is there twice")
    return keys


def _check(arrays: dict[str, NDArray]) -> None:
    """Do they fit together? Raises ValueError where not."""
    starts, k, ranks = arrays["sample_offsets"], arrays["k"], arrays["topk_ranks"]
    keys, samples = keys_of(arrays["sample_keys"]), len(arrays["sample_hashes"])
    tokens, ranked, entries = len(k), len(arrays["ranked_ids"]), int(k.sum(dtype=np.int64))
    if len(keys) != samples:
        raise ValueError(f"{len(keys):,} keys, expected {samples:,}")
    if len(starts) != samples + 1 or starts[0] != 0 or starts[-1] != tokens:
        raise ValueError(f"sample_offsets do not lead from 0 to {tokens:,} in {samples:,} steps")
    if (arrays["beyond_knee"] > k).any():
        raise ValueError("a token's knee is negative")
    if len(ranks) != entries:
        raise ValueError(f"topk_ranks has {len(ranks):,} entries, expected {entries:,} by k")
    if (ranks.dtype.itemsize == 2) != (ranked <= _NARROW):
        raise ValueError(f"topk_ranks is of type {ranks.dtype.name} for {ranked:,} ids")
    require_different(ranks, k)


def require_different(ids: NDArray, k: NDArray) -> None:
    """Refuse an id, or its rank, that a token has twice: which of two logprobs a reader took would be chance.

    Entries are sorted by it, 16 bits at a time, for which numpy has its fastest sort: a token's own then
    stay in order, so that equal ones are neighbours.

    Args:
        ids: [sum k] uint16 or uint32.
        k: [N] entries of each token, one at least.

    Raises:
        ValueError: there is one.
    """
    rows = max(1, _SORTED // int(k.max()))
    for first in range(0, len(k), rows):
        some = k[first : first + rows]
        here = ids[: int(some.sum(dtype=np.int64))]
        ids = ids[len(here) :]
        order = np.lexsort(here.view("<u2").reshape(len(here), -1).T)
        here, tokens = here[order], np.repeat(np.arange(len(some)), some)[order]
        if ((here[1:] == here[:-1]) & (tokens[1:] == tokens[:-1])).any():
            raise ValueError("a token has an id twice")
