"""What a shard's arrays must be: each by itself, and all of them together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.array_rules import MOST_CODE, ArrayRule
from cachekd.config.fields import KEPT

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
NARROW = 2**16  # ids whose places fit into 16 bits
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
        """The sizes, by the names that the rules have."""
        return {**self._asdict(), "starts": self.samples + 1}


def require_fitting(arrays: dict[str, NDArray]) -> None:
    """Refuse arrays that do not fit together.

    Raises:
        ValueError: what does not.
    """
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
    if (ranks.dtype.itemsize == 2) != (ranked <= NARROW):
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


def keys_of(characters: NDArray) -> list[str]:
    """The keys, from `sample_keys`.

    Raises:
        ValueError: no UTF-8, or one is there twice.
    """
    keys = characters.tobytes().decode().split("\n")
    if len(set(keys)) != len(keys):
        raise ValueError("a key is there twice")
    return keys
