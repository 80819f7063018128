"""Which samples come when, and reading on from one epoch into the next.

The order is a matter of seed and epoch alone, in every process and after resuming. accelerate tells its own
random sampler which epoch begins, but not where a resumed run skips the batches that it has had and there are
several processes: the rest of a later epoch then came from the first one's order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import cycle, islice
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from cachekd.data.batches import BatchLimits
from cachekd.data.loader import WorkerLoader, prefetched


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


def limits_of_batches(args: TrainingArguments) -> BatchLimits:
    """What a batch of one process holds."""
    return BatchLimits(args.per_device_train_batch_size, getattr(args, "batch_tokens", None))


class TokenBatches(Sampler[list[int]]):
    """Batches of samples of similar length with about as many padded tokens each, in random order.

    An epoch always has as many batches, of the same lengths: a run knows its steps beforehand. From one epoch
    to the next samples change places with others of their own length, and batches with each other.

    Args:
        lengths: of each sample, about.
        limits: of a batch.
        processes: that share the batches; each gets as many. For that, the batches with most samples are cut
            in two, and of fewer samples than processes some come twice.
        seed: of the order.
        epoch: which epoch begins, asked at its beginning.
    """

    def __init__(
        self, lengths: list[int], limits: BatchLimits, *, processes: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        limits.say_what_runs_alone(max(lengths))
        self._lengths, self._seed, self._epoch = torch.tensor(lengths), seed, epoch
        self._sizes = [len(batch) for batch in limits.cut(lengths)]
        while len(self._sizes) % processes and (most := max(self._sizes)) > 1:
            place = self._sizes.index(most)
            self._sizes[place : place + 1] = [most // 2, most - most // 2]
        self._batches = len(self._sizes) + -len(self._sizes) % processes

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        order = torch.randperm(len(self._lengths), generator=generator)
        order = order[self._lengths[order].argsort(stable=True)]  # as they are cut: shortest first
        batches = [some.tolist() for some in order.split(self._sizes)]
        places = torch.randperm(len(batches), generator=generator).tolist()
        for place in islice(cycle(places), self._batches):
            yield batches[place]


def order_of(args: TrainingArguments, data: Any, epoch: Callable[[], int]) -> Sampler[int] | None:
    """Choose the order of `train_sampling_strategy`; None where it is one that depends on nothing random.

    Args:
        data: that can tell its `lengths`, where samples are grouped by them.
        epoch: which epoch begins, asked at its beginning.
    """
    seed = _seed(args)
    if args.train_sampling_strategy == "random":
        return RandomOrder(len(data), seed=seed, epoch=epoch)
    if args.train_sampling_strategy == "group_by_length":
        in_a_step = args.train_batch_size * args.gradient_accumulation_steps
        return LengthGroups(data.lengths(), in_a_step, seed=seed, epoch=epoch)
    return None


def token_loader(
    args: TrainingArguments,
    data: Any,
    collate: Callable[[list[Any]], Any],
    epoch: Callable[[], int],
    on: Accelerator,
) -> DataLoader | None:
    """Load batches by `batch_tokens`, as the Trainer loads those of one size; None without the setting.

    Args:
        data: that can tell its `lengths`.
        epoch: which epoch begins, asked at its beginning.
        on: what gives each process its batches.
    """
    if getattr(args, "batch_tokens", None) is None:
        return None
    limits, processes = limits_of_batches(args), on.num_processes
    batches = TokenBatches(data.lengths(), limits, processes=processes, seed=_seed(args), epoch=epoch)
    on.even_batches = False  # they are
    loader = DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return on.prepare(loader)


def _seed(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed


class ReadsOn(WorkerLoader):
    """A DataLoader that begins its next epoch as soon as it has handed out the last batch of one.

    A DataLoader's workers rest from then until the next epoch is asked for, so that every epoch begins with
    waiting for its first batch: a large share of the time where epochs are short.

    Args:
        loader: what to be like; its workers have to be persistent.
        goes_on: whether another epoch follows the one that is read; asked at its end.

    Attributes:
        begins_next: true while the next epoch is begun. Its order is asked for then, when the training loop
            is still in this epoch.
    """

    def __init__(self, loader: DataLoader, goes_on: Callable[[], bool]) -> None:
        self.__dict__.update(WorkerLoader.like(loader).__dict__)
        self._goes_on = goes_on
        self._begun: Iterator[Any] | None = None
        self._reading: Iterator[Any] = iter(())
        self.begins_next = False

    def __iter__(self) -> Generator[Any]:  # type: ignore[override]
        batches, self._begun = self._begun, None
        batches = super().__iter__() if batches is None else batches
        # A batch comes as a file handle for each tensor, asked for one by one of a worker that encodes
        # meanwhile. On a GPU the thread that pins memory has this wait; else one of ours has it.
        self._reading = batches if self.pin_memory else prefetched(batches, 1)
        yield from self._reading
        if self._goes_on():
            self.begins_next = True
            self._begun = super().__iter__()  # gives the workers their first batches at once
            self.begins_next = False

    def stop(self) -> None:
        """End the workers now. A garbage collector that finds them closes their queues first, so that they
        are not told to end, and waits five seconds for each."""
        if isinstance(self._reading, Generator):
            self._reading.close()
        workers: Any = self._iterator  # which type checkers know too little of
        if workers is not None:
            workers._shutdown_workers()
