"""Stop in order at SIGTERM, which batch systems send, as at Ctrl-C; and say how to go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from cachekd_cli.console import errors, say

# Seconds in which a second signal is taken for the first. A launcher that is signalled with its whole job
# passes on what its processes have had already; `timeout`, and others that end jobs, send SIGTERM to the
# process and once more to its group.
PASSED_ON = 5.0


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def terminate_like_interrupt() -> None:
    """Have SIGTERM raise `Terminated` in the main thread from now on."""

    def stop(*_args: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


def interrupt(number: int, text: str = "") -> KeyboardInterrupt:
    """The exception that a signal raises.

    Args:
        number: SIGTERM or SIGINT.
        text: what was done about it.
    """
    return Terminated(text) if number == signal.SIGTERM else KeyboardInterrupt(text)


@contextmanager
def stopping_in_order(
    how_to_go_on: Callable[[KeyboardInterrupt], str] = lambda _: "stopped: the same command goes on with it",
) -> Iterator[None]:
    """Say how to go on when the block is stopped, and exit as shells expect: 128 and the signal's number.

    Raises:
        typer.Exit: it was stopped.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if text := how_to_go_on(stop):
            say(text, errors)
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        raise typer.Exit(128 + number) from None


@contextmanager
def noting_the_first(under_way: Callable[[], bool], tell: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """Let a loop end in order: the first SIGINT or SIGTERM is only noted, and a second one stops at once.

    The same SIGTERM again, or any signal under a launcher, counts as a second one only after `PASSED_ON`
    seconds.

    Args:
        under_way: whether the loop runs; before it does, the first one stops at once too.
        tell: called at the first one, between any two instructions.

    Yields:
        what tells the number of the signal that came; 0 if none has.

    Raises:
        KeyboardInterrupt: one was noted, and the block came to its end nevertheless.
    """
    noted, since = 0, 0.0

    def note(number: int, _frame: Any) -> None:
        nonlocal noted, since
        may_be_the_same = "LOCAL_RANK" in os.environ or number == noted == signal.SIGTERM
        if noted and may_be_the_same and time.monotonic() - since < PASSED_ON:
            return
        if noted or not under_way():
            raise interrupt(number)
        noted, since = number, time.monotonic()
        tell()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted:
        raise interrupt(noted)
