"""SIGTERM, which batch systems send, means the same as Ctrl-C: stop in order, and say how to go on."""

from __future__ import annotations

import signal
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def terminate_like_interrupt() -> None:
    """From now on SIGTERM raises `Terminated` in the main thread."""

    def stop(*_args: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


def exit_code(error: KeyboardInterrupt) -> int:
    """As shells have it: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
