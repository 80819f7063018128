"""A cache as a plain torch Dataset, for training loops that are not ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from cachekd.cache import LogitCache
from cachekd.export.sparse import SparseTargets, open_cache

_FILLS = {"token_ids": 0, "k": 0, "topk_ids": 0, "topk_logprobs": float("-inf"), "tail_logmass": 0}


class CachedLogits(Dataset):
    """What a cache keeps exactly, sample by sample: map-style, safe in forked and spawned workers.

    >>> data = CachedLogits("caches/llava-7b", top_k=16)
    >>> loader = DataLoader(data, batch_size=8, num_workers=2, collate_fn=data.collate)
    >>> for batch in loader:
    ...     student = logits.log_softmax(-1).gather(-1, batch["topk_ids"])  # logits [B, T, V] of your model

    An item is a dict: `key` (str); over its N answer tokens `token_ids` [N] int64, `k` [N] int64, `topk_ids`
    [N, K] int64 and `topk_logprobs` [N, K] float32 in descending probability, padded with 0 and -inf beyond a
    token's k, and `tail_logmass` [N] float32, log of the probability that is in no entry. Logprobs are
    normalised over the whole vocabulary. For logprobs at any id, `LogitCache(...)[key].gather(ids)`.

    Shards are decoded whole, and up to a gigabyte of them is kept. In the order of the shards (that of
    `keys`) this is fast. If items are shuffled over a larger cache, every item may decode a shard.

    Args:
        cache: the folder, or an open cache.
        top_k: most entries per token, the mass of the others goes to the tail; None: all that are kept.

    Raises:
        CachekdError: it is no cache, or holds less than `top_k`.
    """

    def __init__(self, cache: LogitCache | str | Path, top_k: int | None = None) -> None:
        self.cache = open_cache(cache, top_k)
        self.keys, self.top_k = list(self.cache), top_k

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Raises:
            CachekdError: its shard is damaged.
            IndexError: there is no such sample.
        """
        key = self.keys[index]
        targets = SparseTargets.from_sparse(self.cache.sparse(key), self.top_k)
        tensors = {name: torch.from_numpy(values) for name, values in targets.arrays().items()}
        return {"key": key, **{name: _as_ids(values) for name, values in tensors.items()}}

    @staticmethod
    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad items to one batch.

        Returns:
            `keys`, and `token_ids` [B, T], `k` [B, T], `topk_ids` [B, T, K], `topk_logprobs` [B, T, K],
            `tail_logmass` [B, T]; `answer_mask` [B, T] bool is False in the padding, where the others are 0
            (`topk_logprobs`: -inf).
        """
        width = max(item["topk_ids"].shape[1] for item in items)
        batch: dict[str, Any] = {"keys": [item["key"] for item in items]}
        for name, fill in _FILLS.items():
            rows = [_widened(item[name], width, fill) for item in items]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=fill)
        whole = [torch.ones(len(item["token_ids"]), dtype=torch.bool) for item in items]
        batch["answer_mask"] = pad_sequence(whole, batch_first=True)
        return batch


def _as_ids(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.long()


def _widened(values: Tensor, width: int, fill: float) -> Tensor:
    if values.ndim == 1:
        return values
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
