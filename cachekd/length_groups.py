"""Batches of samples of similar length, so that little is padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroups(LengthGroupedSampler):
    """transformers' sampler, in an order that depends on seed and epoch alone.

    Its own draws from the global random state, which a resumed run has not in the same state at the start of
    the epoch, and which several processes need not share.

    Args:
        lengths: of each sample.
        batch_size: samples of an optimizer step of one process; they are of similar length.
        seed: of the order.
        epoch: which epoch begins, asked at its beginning.
    """

    def __init__(self, lengths: list[int], batch_size: int, *, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch())
        return super().__iter__()
