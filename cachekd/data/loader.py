"""Samples read and encoded ahead: in a thread, or in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

from cachekd.data.sample import Sample, Samples
from cachekd.errors import BadSample, CachekdError, first_line, without_frames

T = TypeVar("T")
_POLL = 0.1  # seconds between looks at whether anyone still wants more
# Only Linux says who sent a signal; elsewhere SIGTERM stays what stops a worker.
_LEFT_TO_THE_PARENT = {signal.SIGINT, signal.SIGTERM} if sys.platform == "linux" else {signal.SIGINT}
_LOOK = 1.0  # seconds between looks at whether the main process is still there
T_co = TypeVar("T_co", covariant=True)
_PER_MESSAGE = 4  # samples; with two messages per worker ahead, what is in flight is 8 samples a worker
_AHEAD = 2


class _End:
    """The iterator is at its end, or failed."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(items: Iterator[T], size: int) -> Generator[T]:
    """Make up to `size` of the items ahead, in a thread; errors come at their place."""
    waiting: queue.Queue[T | _End] = queue.Queue(size)
    stopped = threading.Event()

    def offer(item: T | _End) -> None:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=_POLL)
                break
            except queue.Full:
                continue

    def fill() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                offer(item)
                if stopped.is_set():
                    break
        except BaseException as caught:
            error = caught
        finally:
            if isinstance(items, Generator):
                items.close()  # here: a generator can be closed by the thread that runs it only
        offer(_End(error))

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := waiting.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join()


class WorkerLoader(DataLoader):
    """A DataLoader whose workers die neither of Ctrl-C nor of SIGTERM, which terminals and batch systems send
    to all processes of a job. The main process decides what they mean: it may still want the batches of the
    step that runs. Workers end when it stops them, and when it is gone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.worker_init_fn = partial(_begin, self.worker_init_fn)

    @classmethod
    def like(cls, loader: DataLoader) -> WorkerLoader:
        """One that takes the place of another, as accelerate has built it."""
        new = cls.__new__(cls)
        new.__dict__.update(loader.__dict__)
        new.worker_init_fn = partial(_begin, loader.worker_init_fn)
        return new

    def __iter__(self) -> Any:
        with _starting_workers():
            return super().__iter__()


def dead_worker(error: RuntimeError) -> CachekdError | None:
    """What a DataLoader says of a worker that died, for people; None for any other error."""
    if "exited unexpectedly" not in str(error) and "is killed by signal" not in str(error):
        return None
    return CachekdError(
        "a process that reads samples died",
        found=first_line(error),
        fix="fewer --workers need less memory; --workers 0 reads in the main process and shows the cause",
    )


@contextmanager
def _starting_workers() -> Iterator[None]:
    """What is started here holds signals back from its first instruction on: a spawned process takes seconds
    until it runs code of ours. And workers are the parallelism: without the variable each forked one prints a
    warning about deadlocks."""
    given = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = given or "false"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if given is None:
            del os.environ["TOKENIZERS_PARALLELISM"]


def _begin(then: Callable[[int], None] | None, worker: int) -> None:
    """Run in a worker, first of all."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)  # where a fork server was there before
    threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _end_with_the_parent(started_by: int) -> None:
    """Obey the main process alone of those whose signals are held back: it stops a worker that does not end
    by itself. When that process is gone, none is waited for: a worker that cannot get rid of its last
    batch would stay for ever.

    Args:
        started_by: this process's parent. It is the main one, or a fork server, which lives for as long as
            there are workers; the pipe to the main process tells of that one alone, but where workers are
            forked, they hold it open for each other.
    """
    main = multiprocessing.parent_process()
    assert main is not None  # this is a worker
    while os.getppid() == started_by and main.is_alive():
        if sys.platform != "linux":
            time.sleep(_LOOK)
            continue
        came = signal.sigtimedwait({signal.SIGTERM}, _LOOK)
        if came is not None and came.si_pid == main.pid:
            break
    os._exit(0)  # else torch would raise in the main process that a worker died, when it has stopped it


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
