"""Asking a store for something: what passes is tried again, a stall is given up, and errors are explained."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from cachekd.errors import CachekdError

T = TypeVar("T")
TIMEOUT = 60.0  # seconds without a byte
_TICK = 0.25  # seconds between two looks at the time
_WAITS = (0.5, 1.0, 2.0)  # seconds before the second, third and fourth time
_CERTAIN = (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, ImportError)
_CERTAIN += (ValueError, TypeError, NotImplementedError, InterruptedError)  # type: ignore[assignment]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_BUSY = (408, 429)  # of HTTP's 4xx, those that pass


class Line:
    """The way to a store.

    Args:
        timeout: seconds without a byte after which it is given up.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.cut = threading.Event()  # nobody waits for anything any longer

    def reach(
        self,
        call: Callable[[Watch], T],
        where: str,
        problem: str,
        *,
        recheck: bool = False,
        silent: bool = False,
    ) -> T:
        """What `call` returns. An error that may pass (HTTP's 5xx, a connection that broke) has it called
        again, up to four times within seconds.

        Args:
            where, problem: for the message.
            recheck: whether "there is no such file" may pass too.
            silent: the client does not tell of bytes, and its own limit counts.

        Raises:
            CachekdError: it stalled, or failed for good.
            FileNotFoundError: there is no such file.
        """
        for pause in (*_WAITS, None):
            try:
                return self._watched(call, where, silent)
            except (CachekdError, MemoryError):
                raise
            except Exception as error:
                cause = _cause(error)
                missing = isinstance(cause, FileNotFoundError) or _status(cause) in (404, 410)
                if pause is None or not (recheck if missing else _may_pass(cause)):
                    if missing:
                        raise FileNotFoundError(where) from error
                    raise _explained(cause, where, problem) from error
            self.cut.wait(pause)
        raise AssertionError

    def _watched(self, call: Callable[[Watch], T], where: str, silent: bool) -> T:
        # In a thread, because not every client can be told how long to wait for a byte; a daemon, because the
        # process may end before it does.
        watch, future = Watch(), Future[T]()

        def work() -> None:
            try:
                future.set_result(call(watch))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="store", daemon=True).start()
        try:
            while not wait([future], _TICK).done:
                if self.cut.is_set():
                    raise InterruptedError
                if not silent and time.monotonic() - watch.last > self.timeout:
                    raise CachekdError(
                        "the connection stalled, and was given up",
                        where=where,
                        expected=f"a byte at least every {self.timeout:g} seconds",
                        found="none",
                        fix="run the same command again: what is finished stays; if slow, raise --timeout",
                    )
            return future.result()
        finally:
            watch.given_up = True


class Watch:
    """Is told of every byte that a call moves, and ends the call when nobody waits for it any longer."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.given_up = False

    def beat(self) -> None:
        """A byte was moved."""
        if self.given_up:
            raise InterruptedError
        self.last = time.monotonic()


def _cause(error: BaseException) -> BaseException:
    """The client libraries wrap what happened; fsspec calls all that befell a request a missing file."""
    while isinstance(error, (RuntimeError, FileNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """HTTP's, in the attributes that aiohttp, httpx and botocore have for it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {})
        return response.get("HTTPStatusCode")
    return getattr(error, "status", None) or getattr(response, "status_code", None)


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if isinstance(status, int):
        return status >= 500 or status in _BUSY
    waited = "Timeout" in type(error).__name__  # long enough: a client's own limit is not below ours
    return not waited and not isinstance(error, _CERTAIN) and getattr(error, "errno", None) not in _DISK


def _explained(error: BaseException, where: str, problem: str) -> CachekdError:
    if isinstance(error, ImportError):
        return CachekdError(
            "a package is missing that reads such addresses", where=where, found=str(error), fix=str(error)
        )
    first = str(error).strip().split("\n")[0]
    return CachekdError(
        problem,
        where=where,
        found=f"{type(error).__name__}: {first}",
        fix="mend what it says, then run the same command again: what is finished stays",
    )
