"""Measured in processes of their own: what one of them holds in memory is no other's."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


def apart(function: Callable[Given, Result], *arguments: Given.args, **named: Given.kwargs) -> Result:
    """Call in a forked process, which has imported all that this one has, and whose peak begins anew.

    This process must not have computed anything: neither a GPU nor threads of OpenMP live through a fork.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
        return process.submit(function, *arguments, **named).result()


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak (ru_maxrss begins with its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def printed_by(function: Callable[Given, object], *arguments: Given.args, **named: Given.kwargs) -> str:
    """Call; what it prints."""
    with redirect_stdout(io.StringIO()) as said:
        function(*arguments, **named)
    return said.getvalue()
