"""SIGTERM, which batch systems send, means the same as Ctrl-C: stop in order, and say how to go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from cachekd_cli.console import errors


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


@contextmanager
def resumable() -> Iterator[None]:
    """For what goes on when its command is repeated: say so when it is stopped.

    Raises:
        typer.Exit: it was stopped.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        errors.print("stopped: the same command goes on with it")
        raise typer.Exit(exit_code(stop)) from None
