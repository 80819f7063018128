"""A folder at a URL: s3://, gs://, file://, memory://, https:// (to read), and whatever else fsspec knows."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from cachekd.atomic import commit_first, is_stale, is_temporary, temporary_name
from cachekd.cache.manifest import ListedFile
from cachekd.errors import CachekdError
from cachekd.hub.store import Moved, Progress, Store

T = TypeVar("T")
_BLOCK = 2**23


class FsspecStore(Store):
    """How a file gets its name: see `_PUT`.

    Args:
        url: of the folder; it does not have to exist.
        timeout: seconds without a byte after which HTTP and S3 are given up; other clients have none.
    """

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(url.rstrip("/"), timeout)
        options = _OPTIONS.get(url.partition("://")[0], lambda timeout: {})(timeout)
        # An instance of our own, because of what is set in it.
        self._fs, root = url_to_fs(self.url, skip_instance_cache=True, **options)
        self._root, self.rechecks = root.rstrip("/"), self._fs.async_impl
        self._kind = self._fs.protocol if isinstance(self._fs.protocol, str) else self._fs.protocol[0]
        self._get: Callable[..., Any] = self._fs.get_file
        if self._kind == "s3":
            self._fs.retries = 1  # `reach` tries again
            self._get = functools.partial(self._get, max_concurrency=1)  # else 500 MB of a file are in memory
        elif self._kind == "file":  # its own copies in one go, and tells nobody
            self._get = functools.partial(AbstractFileSystem.get_file, self._fs)
        self._digest = functools.cache(self._read_digest)

    def look(self) -> None:
        self._fs.invalidate_cache()

    def sha256(self, name: str) -> str | None:
        path = self._path(name)

        def call() -> str:
            return self._digest(path, str(self._fs.info(path)))  # with an ETag, or time and inode

        with suppress(FileNotFoundError):
            return self.reach(call, "the file cannot be read", name)
        return None

    def _read_digest(self, path: str, _as_it_was: str) -> str:
        with self._fs.open(path, "rb", block_size=_BLOCK) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def get(self, name: str, folder: Path, moved: Moved) -> None:
        self._get(self._path(name), str(folder / name), callback=moved)

    def put(self, files: Sequence[ListedFile], folder: Path, progress: Progress) -> None:
        for parent in {file.name.rpartition("/")[0] for file in files}:
            self._prepare(parent)
        for file in files:
            self._upload(file, folder / file.name, progress)

    def _upload(self, file: ListedFile, source: Path, progress: Progress) -> None:
        put = _PUT.get(self._kind, _put_by_looking)

        def call() -> None:
            moved = Moved(f"{self.url}/{file.name}", file.bytes, progress)
            try:
                put(self._fs, str(source), self._path(file.name), moved)
            except FileExistsError:  # someone was faster; what it is will be compared
                moved.finish()
            except BaseException:
                moved.undo()
                raise

        self._write(call, file.name)

    def put_first(self, name: str, content: bytes) -> bool:
        path = self._path(name)

        def call() -> bool:
            if self._kind == "file":
                return commit_first(Path(path), content)
            try:
                self._fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True

        self._prepare("")
        return self._write(call, name)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.reach(lambda: self._fs.rm_file(self._path(name)), "the file cannot be removed", name)

    def _prepare(self, name: str) -> None:
        """Make a folder, and remove what pushes left in it that are dead."""
        folder = self._path(name)

        def call() -> None:
            if not self._fs.isdir(folder):
                # Elsewhere the parents may be a bucket, made because its name was mistyped.
                with suppress(FileExistsError):
                    self._fs.mkdir(folder, create_parents=self._kind == "file")
            for entry in self._fs.ls(folder, detail=True):
                path = Path(entry["name"])
                if is_temporary(path) and is_stale(path.name, _modified(entry)):
                    with suppress(FileNotFoundError):
                        self._fs.rm_file(entry["name"])

        if self._kind != "s3":  # which has neither
            self._write(call, name)

    def _write(self, call: Callable[[], T], name: str) -> T:
        try:
            return self.reach(call, "the file cannot be uploaded", name)
        except FileNotFoundError as error:
            raise CachekdError(
                "the file cannot be uploaded: there is no such bucket or folder",
                where=f"{self.url}/{name}",
                found=str(error.__cause__),
                fix="make it first: none is made for a name that may be mistyped",
            ) from None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")


# Putting a file: it appears when it is whole. FileExistsError: there is one.


def _put_s3(fs: Any, source: str, path: str, moved: Moved) -> None:
    fs.put_file(source, path, callback=moved, chunksize=_BLOCK, mode="create")  # If-None-Match


def _put_by_link(fs: Any, source: str, path: str, moved: Moved) -> None:
    """Put a file on this machine or its mounts; where these have no links, as elsewhere."""
    with _temporary(fs, path) as temporary:
        AbstractFileSystem.put_file(fs, source, temporary, callback=moved)
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:
            _rename(fs, temporary, path)


def _put_by_looking(fs: Any, source: str, path: str, moved: Moved) -> None:
    with _temporary(fs, path) as temporary:
        fs.put_file(source, temporary, callback=moved)
        _rename(fs, temporary, path)


def _rename(fs: Any, temporary: str, path: str) -> None:
    if fs.exists(path):
        raise FileExistsError(path)
    fs.mv(temporary, path)


@contextmanager
def _temporary(fs: Any, path: str) -> Iterator[str]:
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/{temporary_name(name)}"
    try:
        yield temporary
    finally:
        with suppress(Exception):  # it is gone where it was moved; else a later push removes it
            fs.rm_file(temporary)


_PUT = {"s3": _put_s3, "file": _put_by_link}


def _http(timeout: float) -> dict[str, Any]:
    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    # Not compressed, so that a length is that of the file.
    return {"client_kwargs": {"timeout": limits, "headers": {"Accept-Encoding": "identity"}}}


def _s3(timeout: float) -> dict[str, Any]:
    limits = {"connect_timeout": timeout, "read_timeout": timeout}
    return {"config_kwargs": {**limits, "retries": {"total_max_attempts": 1}}}


_OPTIONS = {"http": _http, "https": _http, "s3": _s3, "s3a": _s3}


def _modified(entry: dict[str, Any]) -> float:
    """When a file was; where its file system does not tell, never: only a dead process's is removed then."""
    times = (entry.get(name) for name in ("mtime", "LastModified", "created"))
    time = next((time for time in times if time is not None), float("inf"))
    return time.timestamp() if isinstance(time, datetime) else float(time)
