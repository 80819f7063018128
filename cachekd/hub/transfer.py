"""Files moved to or from a store: what there is to move, again where it failed, with progress."""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

from fsspec.callbacks import Callback

from cachekd.cache.layout import SHARD_FOLDER, SKIPPED_FILE
from cachekd.cache.manifest import Manifest
from cachekd.config.fields import STORE_TIMEOUT
from cachekd.errors import CachekdError

T = TypeVar("T")
_WAITS = (0.5, 1.0, 2.0)  # seconds before the second, third and fourth time
_CERTAIN = (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, ImportError)
_CERTAIN += (ValueError, TypeError, NotImplementedError, InterruptedError)  # type: ignore[assignment]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_BUSY = (408, 429)  # of HTTP's 4xx, those that pass
CARD_FILE = "README.md"
Progress = Callable[[int], None]  # is told of bytes that are done; of fewer than none when they came in vain


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


@dataclass(frozen=True)
class Listed:
    """A file that the manifest lists.

    Attributes:
        name: its path in the cache.
        bytes, sha256: of its content.
    """

    name: str
    bytes: int
    sha256: str


def listed(name: str, content: bytes) -> Listed:
    """List a file with this content as a manifest would."""
    return Listed(name, len(content), hashlib.sha256(content).hexdigest())


def listed_files(manifest: Manifest) -> list[Listed]:
    """All that a reader needs beside the manifest. A finished dump's plan and records are no part of it.

    The manifest's model has checked the names: they cannot lead out of a folder.
    """
    files = [Listed(f"{SHARD_FOLDER}/{info.name}", info.bytes, info.sha256) for info in manifest.shards]
    files += [Listed(info.name, info.bytes, info.sha256) for info in manifest.sketches]
    if manifest.skipped is not None:
        files.append(Listed(SKIPPED_FILE, manifest.skipped.bytes, manifest.skipped.sha256))
    return files


def not_listed(where: str, expected: str, found: str) -> CachekdError:
    """What to tell of a published file that the manifest does not know so."""
    return CachekdError(
        "a published file is not the one that the manifest lists",
        where=where,
        expected=expected,
        found=found,
        fix="run the same command again; if it stays so, tell who published it: the files were changed",
    )


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
        """Count the rest, which was there before."""
        self._progress(self.listed - self.value)

    def undo(self) -> None:
        """Take back what was told: it came in vain."""
        self._progress(-self.value)

    def _refuse(self, found: str) -> None:
        most = "" if self.exact else " at most"
        raise not_listed(self.where, f"{self.listed:,} bytes{most}", found)


def while_bytes_move(call: Callable[[], object], moved: Moved, timeout: float) -> None:
    """Run a client that cannot be told how long to wait for a byte.

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
