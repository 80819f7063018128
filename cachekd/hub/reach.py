"""A call to a store: tried again where its failure may pass, and where not, an error for people."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from cachekd.config.fields import STORE_TIMEOUT
from cachekd.errors import CachekdError, missing_package, what_failed

T = TypeVar("T")

_WAITS = (0.5, 1.0, 2.0)  # seconds before the second, third and fourth time
_CERTAIN = (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, ImportError)
_CERTAIN += (ValueError, TypeError, NotImplementedError, InterruptedError)  # type: ignore[assignment]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_BUSY = (408, 429)  # of HTTP's 4xx, those that pass


def reach(
    call: Callable[[], T], where: str, problem: str, *, timeout: float = STORE_TIMEOUT, recheck: bool = False
) -> T:
    """What `call` returns. An error that may pass (HTTP's 5xx, a connection that broke) has it called again,
    up to four times within seconds. A client that has waited for `timeout` seconds has waited long enough.

    Args:
        where, problem: for the message.
        timeout: what the client was told to wait for a byte at most.
        recheck: whether "there is no such file" may pass too.

    Raises:
        CachekdError: it stalled, or failed for good.
        FileNotFoundError: there is no such file.
    """
    for pause in (*_WAITS, None):
        try:
            return call()
        except (CachekdError, MemoryError):
            raise
        except Exception as error:
            cause = _cause(error)
            if _waited(cause):
                raise stalled(where, timeout) from error
            missing = isinstance(cause, FileNotFoundError) or _status(cause) in (404, 410)
            if pause is None or not (recheck if missing else _may_pass(cause)):
                if missing:
                    raise FileNotFoundError(where) from error
                raise _explained(cause, where, problem) from error
        time.sleep(pause)
    raise AssertionError


def stalled(where: str, timeout: float) -> CachekdError:
    """What to tell of a store that fell silent."""
    return CachekdError(
        "the connection stalled, and was given up",
        where=where,
        expected=f"a byte at least every {timeout:g} seconds",
        found="none",
        fix="run the same command again: what is finished stays; push and pull take a larger --timeout",
    )


def _cause(error: BaseException) -> BaseException:
    """The client libraries wrap what happened; fsspec calls all that befell a request a missing file."""
    while isinstance(error, (RuntimeError, FileNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _waited(error: BaseException) -> bool:
    """Whether it is a client's own limit: aiohttp's, httpx's and botocore's have no class in common."""
    return isinstance(error, TimeoutError) or "Timeout" in type(error).__name__


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
    return not isinstance(error, _CERTAIN) and getattr(error, "errno", None) not in _DISK


def _explained(error: BaseException, where: str, problem: str) -> CachekdError:
    if isinstance(error, ImportError):
        return missing_package(where, error)
    return CachekdError(
        problem,
        where=where,
        found=what_failed(error),
        fix="mend what it says, then run the same command again: what is finished stays",
    )
