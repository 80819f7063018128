"""A store of caches, which an address names: what is asked of it, and how its files are downloaded."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from fsspec.callbacks import Callback

from cachekd.cache.manifest import ListedFile
from cachekd.config.fields import STORE_TIMEOUT
from cachekd.errors import CachekdError
from cachekd.hub.reach import reach
from cachekd.paths import HUB_CACHE, is_path

T = TypeVar("T")
Progress = Callable[[int], None]  # is told of bytes that are done; of fewer than none when they came in vain

FORMS = (
    "hf://datasets/org/name[@revision] on the Hugging Face hub, or org/name where no folder org is here; a "
    "URL that fsspec knows, such as s3://bucket/caches/llava; or a folder on this disk, such as ./llava"
)


def open_store(address: str, *, revision: str | None = None, timeout: float = STORE_TIMEOUT) -> Store:
    """The store that an address means; nothing is asked of it yet. What begins as a path on this disk is one.

    Args:
        timeout: seconds without a byte after which it is given up.

    Raises:
        CachekdError: it is no such address.
    """
    if "://" not in address and is_path(address):
        address = f"file://{os.path.abspath(address)}"
    if hub := HUB_CACHE.fullmatch(address.removeprefix("hf://datasets/")):
        named = hub[2]
        if named is not None and revision is not None and named != revision:
            raise CachekdError("two revisions are named", where=address, found=f"--revision {revision}")
        from cachekd.hub.hub_store import HubStore

        return HubStore(hub[1], named if revision is None else revision, timeout)
    if "://" not in address or address.startswith("hf://"):
        fix = f"for a folder on this disk: ./{address}"
        if address.startswith("hf://"):
            fix = "a cache is the whole of a data set repository: hf://datasets/org/name"
        raise CachekdError("this is no address of a cache", where=address, expected=FORMS, fix=fix)
    if revision is not None:
        raise CachekdError("only repositories of the hub have revisions", where=address, found=revision)
    from cachekd.hub.fsspec_store import FsspecStore

    return reach(lambda: FsspecStore(address, timeout), address, "the address cannot be used")


class Store(ABC):
    """A folder somewhere else. Names are paths in it, such as `shards/00000.zarr.zip`.

    Attributes:
        conditional: whether a put is refused where anything changed since `look`.
        rechecks: whether "there is no such file" may pass.
        at_a_time: downloads.
    """

    conditional = False
    rechecks = False
    at_a_time = 4

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout

    def create(self, *, private: bool) -> None:
        """Make what has to be there before anything is put, where such a thing is made.

        Raises:
            CachekdError: it is, or would be, public, though it should be private.
        """
        if private:
            fix = "set the bucket's own permissions"
            raise CachekdError("--private is for the hub", where=self.url, fix=fix)

    @abstractmethod
    def look(self) -> None:
        """Forget what is known: what is asked from here on is what is there now."""

    @abstractmethod
    def sha256(self, name: str) -> str | None:
        """The checksum of a file, None where there is none; a store that keeps none reads the file."""

    @abstractmethod
    def get(self, name: str, folder: Path, moved: Moved) -> None:
        """Download a file to its name in `folder`, once.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def put(self, files: Sequence[ListedFile], folder: Path, progress: Progress) -> None:
        """Upload files from `folder`. Each is there as a whole or not at all, and none is overwritten: where
        something was put there since `look`, it stays, and on the hub nothing more is put."""

    @abstractmethod
    def put_first(self, name: str, content: bytes) -> bool:
        """Make a small file if there is none; on the hub, only if nothing changed since `look`.

        Returns:
            whether it was made.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file that this process made."""

    def read(self, name: str, most: int) -> bytes | None:
        """Read a small file; None where there is none.

        Raises:
            CachekdError: it has more bytes than `most`.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._download(name, most, Path(folder), exact=False)
            except FileNotFoundError:
                return None
            return Path(folder, name).read_bytes()

    def fetch(self, files: Sequence[ListedFile], folder: Path, progress: Progress) -> Iterator[ListedFile]:
        """Download files to their names in `folder`, in any order; yields each when it is there.

        Raises:
            CachekdError: there is no such file, or it has another size: that is known at its first block
                where the store tells sizes, and at the first block too many where it does not.
        """
        stop = threading.Event()

        def one(file: ListedFile) -> ListedFile:
            try:
                self._download(file.name, file.bytes, folder, progress=progress, stop=stop)
            except FileNotFoundError:
                raise not_listed(f"{self.url}/{file.name}", f"{file.bytes:,} bytes", "no file") from None
            return file

        with ThreadPoolExecutor(self.at_a_time, "pull") as pool:
            try:
                for future in as_completed([pool.submit(one, file) for file in files]):
                    yield future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _download(self, name: str, size: int, folder: Path, **counted: Any) -> None:
        """`counted`: of `Moved`."""
        to = folder / name

        def call() -> None:
            moved = Moved(f"{self.url}/{name}", size, **counted)
            try:
                to.parent.mkdir(parents=True, exist_ok=True)
                self.get(name, folder, moved)
                if moved.exact and (came := to.stat().st_size) != size:
                    raise ConnectionError(f"it ended after {came:,} of {size:,} bytes")
                moved.finish()  # with what an earlier try had fetched
            except BaseException:
                to.unlink(missing_ok=True)
                moved.undo()
                raise

        self.reach(call, "the file cannot be downloaded", name, recheck=self.rechecks)

    def reach(self, call: Callable[[], T], problem: str, name: str = "", *, recheck: bool = False) -> T:
        """See `reach`; `name`: of the file."""
        where = f"{self.url}/{name}" if name else self.url
        return reach(call, where, problem, timeout=self.timeout, recheck=recheck)


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
        exact: whether they have to be as many.
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
        told = self.size  # before the first block it may be that of a page that says what failed
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
