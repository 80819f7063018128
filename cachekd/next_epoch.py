"""Workers go on into the next epoch while the last step of this one computes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

from torch.utils.data import DataLoader

from cachekd.data.loader import WorkerLoader, prefetched


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
        self.begins_next = False

    def __iter__(self) -> Generator[Any]:  # type: ignore[override]
        batches, self._begun = self._begun, None
        batches = super().__iter__() if batches is None else batches
        # A batch comes as a file handle for each tensor, asked for one by one of a worker that encodes
        # meanwhile. On a GPU the thread that pins memory has this wait; else one of ours has it.
        yield from batches if self.pin_memory else prefetched(batches, 1)
        if self._goes_on():
            self.begins_next = True
            self._begun = super().__iter__()  # gives the workers their first batches at once
            self.begins_next = False
