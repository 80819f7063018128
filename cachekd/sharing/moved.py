"""Bytes on their way: they are counted, and too many of them, or none for too long, end a transfer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

from fsspec.callbacks import Callback

from cachekd.sharing.contents import not_listed
from cachekd.sharing.reach import stalled

Progress = Callable[[int], None]  # is told of bytes that are done; of fewer than none when they came in vain


def untold(done: int) -> None:
    """Progress that nobody wants to know."""


class Moved(Callback):
    """What has come of a transfer so far, as fsspec tells it.

    Args:
        where: for the message.
        listed: its bytes, which are all that may come.
        exact: whether they have to be as many. What the store says beforehand is compared at the first block.
        stop: ends the transfer at its next byte when it is set.
    """

    def __init__(
        self,
        where: str,
        listed: int,
        progress: Progress = untold,
        *,
        exact: bool = True,
        stop: threading.Event | None = None,
    ) -> None:
        super().__init__()
        self.where, self.listed, self.exact, self._progress = where, listed, exact, progress
        self.stop = stop or threading.Event()
        self.last = time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        if self.stop.is_set():
            raise InterruptedError
        self.last = time.monotonic()
        told = self.size
        if told is not None and (told != self.listed if self.exact else told > self.listed):
            self._refuse(f"{told:,} bytes")
        if self.value + inc > self.listed:
            self._refuse(f"more than {self.listed:,} bytes")
        self.value += inc
        self._progress(inc)

    def finish(self) -> None:
        """The rest was there before."""
        self._progress(self.listed - self.value)

    def undo(self) -> None:
        """It came in vain."""
        self._progress(-self.value)

    def _refuse(self, found: str) -> None:
        most = "" if self.exact else " at most"
        raise not_listed(self.where, f"{self.listed:,} bytes{most}", found)


def while_bytes_move(call: Callable[[], object], moved: Moved, timeout: float) -> None:
    """For a client that cannot be told how long to wait for a byte.

    Raises:
        CachekdError: none came for `timeout` seconds.
    """
    future = Future[object]()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="store", daemon=True).start()  # nobody waits for a daemon's end
    try:
        while not wait([future], max(0.0, moved.last + timeout - time.monotonic())).done:
            if time.monotonic() - moved.last >= timeout:
                raise stalled(moved.where, timeout)
        future.result()
    finally:
        moved.stop.set()
