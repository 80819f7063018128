"""Encoded samples in a given order, read by worker processes if there are any."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from cachekd.errors import BadSample, CachekdError, without_frames
from cachekd.samples.protocol import Samples
from cachekd.samples.sample import Sample
from cachekd.worker_loader import WorkerLoader, dead_worker

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_PER_MESSAGE = 4  # samples; with two messages per worker ahead, what is in flight is 8 samples a worker
_AHEAD = 2


def read_encoded(
    samples: Samples, encoder: Callable[[Sample], T], indices: Sequence[int], *, workers: int
) -> Iterator[T | BadSample]:
    """Read and encode samples, in the order of `indices`.

    Args:
        samples: the data set.
        encoder: makes model inputs, or whatever else is wanted of a sample; it can be pickled.
        indices: into `samples`.
        workers: processes; 0: in this thread, each sample when it is asked for. Closing the iterator stops
            them.

    Yields:
        For each index the encoded sample, or why it cannot be used.

    Raises:
        CachekdError: the data set cannot be read, or a worker process died.
    """
    read = _Reader(samples, encoder)
    results = _from_workers(read, indices, workers) if workers > 0 else (read[index] for index in indices)
    with closing(results):
        for result in results:
            if isinstance(result, CachekdError) and not isinstance(result, BadSample):
                raise result
            yield result


@dataclass(frozen=True)
class _Reader(Generic[T_co]):
    """Errors for people are values here: a DataLoader would wrap them into its own text and traceback."""

    samples: Samples
    encoder: Callable[[Sample], T_co]

    def __getitem__(self, index: int) -> T_co | CachekdError:
        try:
            return self.encoder(self.samples[index])
        except CachekdError as error:
            return without_frames(error)  # a caller may keep many of these


def _from_workers(read: _Reader[T], indices: Sequence[int], workers: int) -> Generator[T | CachekdError]:
    messages = -(-len(indices) // _PER_MESSAGE)
    loader = WorkerLoader(
        read,  # a map-style data set in all but its class
        batch_size=_PER_MESSAGE,
        sampler=indices,
        num_workers=max(1, min(workers, messages)),
        prefetch_factor=_AHEAD,
        # Plain bytes: torch would send each tensor as a shared-memory segment with an open file descriptor
        # on this side for as long as the tensor lives, and a long queue of samples runs out of them.
        collate_fn=pickle.dumps,
        generator=torch.Generator(),  # else the loader draws its seed from, and so changes, the global state
    )
    batches: Any = iter(loader)  # starts the workers
    try:
        for message in batches:
            yield from pickle.loads(message)
    except RuntimeError as error:
        if (died := dead_worker(error)) is not None:
            raise died from error
        raise
    finally:
        # What dropping the iterator does; but a traceback may keep that alive for long.
        batches._shutdown_workers()
