"""Processes that read samples: they leave signals to the main process, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from cachekd.errors import CachekdError

# Only Linux says who sent a signal; elsewhere SIGTERM stays what stops a worker.
_LEFT_TO_THE_PARENT = {signal.SIGINT, signal.SIGTERM} if sys.platform == "linux" else {signal.SIGINT}
_LOOK = 1.0  # seconds between looks at whether the main process is still there


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
        found=str(error).splitlines()[0],
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
    """In a worker, first of all."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)  # where a fork server was there before
    threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _end_with_the_parent(started_by: int) -> None:
    """Of the signals that are held back, the main process's own is obeyed: it stops a worker that does not
    end by itself. When that process is gone, none is waited for: a worker that cannot get rid of its last
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
