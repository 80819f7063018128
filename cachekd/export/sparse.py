"""What a cache keeps exactly of a sample, as rows of one length or as lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachekd.cache import LogitCache
from cachekd.cache.sparse_logits import TokenTargets, offsets
from cachekd.errors import CachekdError


def require_top_k(cache: LogitCache, top_k: int | None) -> None:
    """Refuse more than there is.

    Raises:
        CachekdError: `top_k` is above what the cache keeps, or below 1.
    """
    most = cache.manifest.codec.top_k
    if top_k is not None and not 1 <= top_k <= most:
        raise CachekdError(
            "the cache cannot give that many logprobs",
            where=str(cache.path),
            expected=f"--top-k from 1 to {most}: no token has more than that exactly",
            found=top_k,
            fix="leave it out for all that is kept; LogitCache rebuilds the others, approximately",
        )


PADDING_ID = 0  # beside a logprob of -inf


@dataclass(frozen=True)
class SparseTargets:
    """N answer tokens, K the most entries that any of them has.

    Attributes:
        token_ids: [N] int32, the answer tokens.
        k: [N] int32, how many entries are kept.
        topk_ids: [N, K] int32, in descending probability, then PADDING_ID.
        topk_logprobs: [N, K] float32, normalised over the whole vocabulary; -inf in the padding.
        tail_logmass: [N] float32, log of the probability that is not in the entries; -inf for nothing.
    """

    token_ids: NDArray[np.int32]
    k: NDArray[np.int32]
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[np.float32]
    tail_logmass: NDArray[np.float32]

    @classmethod
    def from_records(cls, records: TokenTargets, top_k: int | None = None) -> SparseTargets:
        """Pad flat records.

        Args:
            top_k: most entries per token; the mass of the others goes to the tail. None: all.
        """
        if top_k is not None and int(records.k.max(initial=0)) > top_k:
            records = records.truncate(top_k)
        k = records.k.astype(np.int32)
        kept = np.arange(int(k.max(initial=1))) < k[:, None]
        ids = np.full(kept.shape, PADDING_ID, np.int32)
        logprobs = np.full(kept.shape, -np.inf, np.float32)
        ids[kept], logprobs[kept] = records.ids, records.logprobs
        return cls(records.token_ids.astype(np.int32), k, ids, logprobs, records.tail_logmass)

    def arrays(self) -> dict[str, NDArray]:
        """By name."""
        return dict(self.__dict__)


def ragged(records: TokenTargets, top_k: int | None = None) -> dict[str, Any]:
    """The same as lists without padding: a table's row."""
    if top_k is not None and int(records.k.max(initial=0)) > top_k:
        records = records.truncate(top_k)
    cuts = offsets(records.k)[1:-1]
    return {
        "token_ids": records.token_ids.astype(np.int32),
        "topk_ids": np.split(records.ids.astype(np.int32), cuts),
        "topk_logprobs": np.split(records.logprobs, cuts),
        "tail_logmass": records.tail_logmass,
    }
