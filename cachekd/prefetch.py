"""Let one thread prepare what another will need next."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")
_POLL = 0.1  # seconds between looks at whether anyone still wants more


class _End:
    """The iterator is at its end, or failed."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(items: Iterator[T], size: int) -> Generator[T]:
    """The same items, up to `size` of them made ahead in a thread; errors come at their place."""
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
