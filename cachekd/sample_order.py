"""The order of samples in an epoch: a matter of seed and epoch alone, in every process and after resuming.

accelerate tells its own random sampler which epoch begins, but not where a resumed run skips the batches that
it has had and there are several processes: the rest of a later epoch then came from the first one's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler


class RandomOrder(Sampler[int]):
    """Every sample once, as accelerate's `SeedableRandomSampler` orders them.

    Args:
        samples: how many.
        seed: of the order.
        epoch: which epoch begins, asked at its beginning.
    """

    def __init__(self, samples: int, *, seed: int, epoch: Callable[[], int]) -> None:
        self._samples, self._seed, self._epoch = samples, seed, epoch

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        yield from torch.randperm(self._samples, generator=generator).tolist()


class LengthGroups(LengthGroupedSampler):
    """transformers' sampler for batches of samples of similar length, so that little is padded.

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


def order_of(args: TrainingArguments, data: Any, epoch: Callable[[], int]) -> Sampler[int] | None:
    """Of `train_sampling_strategy`; None where it is one that depends on nothing random.

    Args:
        data: that can tell its `lengths`, where samples are grouped by them.
        epoch: which epoch begins, asked at its beginning.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    if args.train_sampling_strategy == "random":
        return RandomOrder(len(data), seed=seed, epoch=epoch)
    if args.train_sampling_strategy == "group_by_length":
        in_a_step = args.train_batch_size * args.gradient_accumulation_steps
        return LengthGroups(data.lengths(), in_a_step, seed=seed, epoch=epoch)
    return None
