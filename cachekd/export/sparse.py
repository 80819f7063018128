"""What every export has: its header, and what a cache keeps exactly, as rows of one length or as lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachekd.cache import LogitCache
from cachekd.cache.sparse_logits import TokenTargets, offsets
from cachekd.errors import CachekdError

EXPORT_FILE = "cachekd_export.json"
EXPORT_VERSION = 1
PADDING_ID = 0  # beside a logprob of -inf


def open_cache(cache: LogitCache | str | Path, top_k: int | None) -> LogitCache:
    """Open a cache of which `top_k` logprobs a token are asked for; None: all.

    Raises:
        CachekdError: it is no cache, or `top_k` is above what it keeps, or below 1.
    """
    cache = cache if isinstance(cache, LogitCache) else LogitCache(cache)
    most = cache.manifest.codec.top_k
    if top_k is not None and not 1 <= top_k <= most:
        raise CachekdError(
            "the cache cannot give that many logprobs",
            where=str(cache.path),
            expected=f"--top-k from 1 to {most}: no token has more than that exactly",
            found=top_k,
            fix="leave it out for all that is kept; LogitCache rebuilds the others, approximately",
        )
    return cache


def export_header(cache: LogitCache, top_k: int | None) -> dict[str, Any]:
    """What an export says of the cache that it was made from, as JSON."""
    manifest = cache.manifest
    return {
        "export_version": EXPORT_VERSION,
        "manifest_sha256": manifest.sha256,
        "teacher": manifest.teacher.model_dump(mode="json"),
        "fingerprints": manifest.fingerprints.model_dump(mode="json"),
        "codec": manifest.codec.model_dump(mode="json"),
        "top_k": top_k,
        "samples": manifest.samples,
        "tokens": manifest.tokens,
    }


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
    def from_sparse(cls, sparse: TokenTargets, top_k: int | None = None) -> SparseTargets:
        """Pad flat entries.

        Args:
            top_k: most entries per token; the mass of the others goes to the tail. None: all.
        """
        sparse = _cut(sparse, top_k)
        ids, logprobs = sparse.padded(PADDING_ID)
        tokens, k = sparse.token_ids.astype(np.int32), sparse.k.astype(np.int32)
        return cls(tokens, k, ids.astype(np.int32), logprobs, sparse.tail_logmass)

    def arrays(self) -> dict[str, NDArray]:
        """Give them by name."""
        return dict(self.__dict__)


def ragged(sparse: TokenTargets, top_k: int | None = None) -> dict[str, Any]:
    """Give the same as lists without padding: a table's row."""
    sparse = _cut(sparse, top_k)
    cuts = offsets(sparse.k)[1:-1]
    return {
        "token_ids": sparse.token_ids.astype(np.int32),
        "topk_ids": np.split(sparse.ids.astype(np.int32), cuts),
        "topk_logprobs": np.split(sparse.logprobs, cuts),
        "tail_logmass": sparse.tail_logmass,
    }


def _cut(sparse: TokenTargets, top_k: int | None) -> TokenTargets:
    return sparse if top_k is None or int(sparse.k.max(initial=0)) <= top_k else sparse.truncate(top_k)
