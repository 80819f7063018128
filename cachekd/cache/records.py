"""What the cache holds of a teacher, in memory: flat arrays over the answer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenTargets:
    """A teacher's sparse distribution at N answer tokens, one flat run of entries per token (CSR).

    Attributes:
        token_ids: [N] uint32, the answer tokens.
        k: [N] uint16, entries kept for each token.
        knee: [N] uint16, Kneedle's k in the window, before any minimum; at most k.
        ids: [sum k] uint32, each token's entries in descending probability.
        logprobs: [sum k] float32, normalised over the whole vocabulary.
        tail_logmass: [N] float32, log of the probability that is not kept; -inf where nothing is left.
    """

    token_ids: NDArray[np.uint32]
    k: NDArray[np.uint16]
    knee: NDArray[np.uint16]
    ids: NDArray[np.uint32]
    logprobs: NDArray[np.float32]
    tail_logmass: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.token_ids)

    def split(self, counts: Sequence[int]) -> list[TokenTargets]:
        """Cut into runs of `counts` tokens, for example one per sample of a batch."""
        tokens = np.cumsum(counts)[:-1]
        entries = offsets(self.k)[tokens]
        per_token = (np.split(a, tokens) for a in (self.token_ids, self.k, self.knee, self.tail_logmass))
        per_entry = (np.split(a, entries) for a in (self.ids, self.logprobs))
        return [
            TokenTargets(token_ids, k, knee, ids, logprobs, tail)
            for token_ids, k, knee, tail, ids, logprobs in zip(*per_token, *per_entry, strict=True)
        ]

    @staticmethod
    def concatenate(parts: Sequence[TokenTargets]) -> TokenTargets:
        """The parts' tokens, one after the other."""
        names = ("token_ids", "k", "knee", "ids", "logprobs", "tail_logmass")
        return TokenTargets(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def offsets(counts: NDArray) -> NDArray[np.int64]:
    """[N + 1] int64: where each run starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def first_of_run(counts: NDArray) -> NDArray[np.int64]:
    """[sum counts] int64: for every entry, the position where its run starts."""
    return np.repeat(offsets(counts)[:-1], counts)
