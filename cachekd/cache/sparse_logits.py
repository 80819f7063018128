"""What the cache holds of a teacher, in memory: flat arrays over the answer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TailStates:
    """What a tail sketch is made from, at N answer tokens.

    Attributes:
        hidden: [N, d] float, the final hidden states as the head reads them.
        log_normaliser: [N] float, logsumexp of the logits over the vocabulary.
    """

    hidden: Tensor
    log_normaliser: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    @staticmethod
    def concatenate(parts: Sequence[TailStates]) -> TailStates:
        """Join the parts' tokens, one after the other."""
        return TailStates(
            torch.cat([part.hidden for part in parts]), torch.cat([part.log_normaliser for part in parts])
        )


@dataclass(frozen=True)
class SketchCodes:
    """The quantised final hidden states of N answer tokens (see `cachekd.cache.tail.sketch`).

    Attributes:
        coordinates: [N, C] int16, steps along each of the sketch's axes.
        shift: [N] int16, steps of what turns its logits into logprobs.
    """

    coordinates: NDArray[np.int16]
    shift: NDArray[np.int16]


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
        sketch: of all the other logprobs; None in a cache without one.
    """

    token_ids: NDArray[np.uint32]
    k: NDArray[np.uint16]
    knee: NDArray[np.uint16]
    ids: NDArray[np.uint32]
    logprobs: NDArray[np.float32]
    tail_logmass: NDArray[np.float32]
    sketch: SketchCodes | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        values = [*vars(self).values(), *(vars(self.sketch).values() if self.sketch else ())]
        return sum(array.nbytes for array in values if isinstance(array, np.ndarray))

    def cut(self, first: int, last: int) -> TokenTargets:
        """Take tokens [first, last)."""
        starts = offsets(self.k)
        return self._cut(slice(first, last), slice(int(starts[first]), int(starts[last])))

    def select(self, tokens: NDArray[np.int64]) -> TokenTargets:
        """Some tokens, by their ascending indices."""
        wanted = np.zeros(len(self), bool)
        wanted[tokens] = True
        return self._cut(wanted, np.repeat(wanted, self.k))

    def truncate(self, top_k: int) -> TokenTargets:
        """Keep at most `top_k` entries of each token; the mass of the others goes to the tail."""
        k, kept = np.minimum(self.k, top_k), among_first(self.k, top_k)
        lost = np.full(len(self), -np.inf)
        np.logaddexp.at(lost, np.repeat(np.arange(len(self)), self.k)[~kept], self.logprobs[~kept])
        return replace(
            self,
            k=k,
            knee=np.minimum(self.knee, k),
            ids=self.ids[kept],
            logprobs=self.logprobs[kept],
            tail_logmass=np.logaddexp(self.tail_logmass, lost).astype(np.float32),
        )

    def padded(self, padding: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The entries as rows of one length: ids [N, K] int64 and logprobs [N, K] float32, K the largest k.

        Args:
            padding: the id behind a token's entries; the logprob there is -inf.
        """
        kept = np.arange(int(self.k.max(initial=1))) < self.k[:, None]
        ids, logprobs = np.full(kept.shape, padding, np.int64), np.full(kept.shape, -np.inf, np.float32)
        ids[kept], logprobs[kept] = self.ids, self.logprobs
        return ids, logprobs

    def split(self, counts: Sequence[int]) -> list[TokenTargets]:
        """Cut into runs of `counts` tokens, for example one per sample of a batch."""
        tokens, starts = offsets(np.asarray(counts)), offsets(self.k)
        return [
            self._cut(slice(int(first), int(last)), slice(int(starts[first]), int(starts[last])))
            for first, last in pairwise(tokens)
        ]

    def _cut(self, tokens: slice | NDArray[np.bool_], entries: slice | NDArray[np.bool_]) -> TokenTargets:
        sketch = self.sketch and SketchCodes(self.sketch.coordinates[tokens], self.sketch.shift[tokens])
        return TokenTargets(
            self.token_ids[tokens],
            self.k[tokens],
            self.knee[tokens],
            self.ids[entries],
            self.logprobs[entries],
            self.tail_logmass[tokens],
            sketch,
        )

    @staticmethod
    def concatenate(parts: Sequence[TokenTargets]) -> TokenTargets:
        """Join the parts' tokens, one after the other; all with a sketch, or none."""
        names = ("token_ids", "k", "knee", "ids", "logprobs", "tail_logmass")
        joined: dict[str, Any] = {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}
        sketches = [part.sketch for part in parts if part.sketch is not None]
        if sketches:
            coordinates = np.concatenate([codes.coordinates for codes in sketches])
            joined["sketch"] = SketchCodes(coordinates, np.concatenate([codes.shift for codes in sketches]))
        return TokenTargets(**joined)


def offsets(counts: NDArray) -> NDArray[np.int64]:
    """[N + 1] int64: where each run starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def among_first(counts: NDArray, most: int) -> NDArray[np.bool_]:
    """[sum counts] bool: for every entry, whether it is among the first `most` of its run."""
    return np.arange(int(counts.sum(dtype=np.int64))) - np.repeat(offsets(counts)[:-1], counts) < most
