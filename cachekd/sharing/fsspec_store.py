"""A folder at a URL: s3://, gs://, file://, memory://, https:// (to read), and whatever else fsspec knows."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from cachekd.cache.files import commit_first, is_stale, is_temporary, temporary_name
from cachekd.errors import CachekdError
from cachekd.sharing.contents import Listed, not_listed
from cachekd.sharing.reach import Line, Watch
from cachekd.sharing.store import Progress

_AT_A_TIME = 4
_BLOCK = 2**23
# Small steps, so that a slow connection can be told from a silent one.
_GET = {"http": {"chunk_size": 2**16}, "s3": {"max_concurrency": 1}}
_PUT = {"s3": {"chunksize": _BLOCK, "mode": "create"}}


class FsspecStore:
    """See `cachekd.sharing.store.Store`.

    On S3 a file appears when it is whole, and its put is conditional; elsewhere it has a temporary name until
    then. Where a file system can link (this machine's and its mounts), naming it is conditional too.

    Args:
        url: of the folder; it does not have to exist.
    """

    def __init__(self, url: str, line: Line) -> None:
        self.url, self._line = url.rstrip("/"), line
        protocol = url.partition("://")[0]
        self._kind = {"https": "http", "s3a": "s3"}.get(protocol, protocol)
        self._fs: Any
        # An instance of our own, because of what is set in it.
        self._fs, self._root = url_to_fs(
            self.url, skip_instance_cache=True, **_options(self._kind, line.timeout)
        )
        if self._kind == "s3":
            self._fs.retries = 1  # `reach` tries again
        self._local = isinstance(self._fs, LocalFileSystem)
        # The local methods copy in one go and tell nobody; the base class goes by blocks.
        self._get: Any
        self._put: Any
        by_blocks = (
            partial(AbstractFileSystem.get_file, self._fs),
            partial(AbstractFileSystem.put_file, self._fs),
        )
        self._get, self._put = by_blocks if self._local else (self._fs.get_file, self._fs.put_file)
        self._known: dict[str, tuple[str, str]] = {}

    def look(self) -> None:
        self._fs.invalidate_cache()

    def sha256(self, name: str) -> str | None:
        def call(watch: Watch) -> str:
            path = self._path(name)
            state = str(self._fs.info(path))  # with an ETag, or time and inode: a file that is as it was
            if self._known.get(name, ("", ""))[0] != state:
                digest = hashlib.sha256()
                with self._fs.open(path, "rb", block_size=_BLOCK) as stream:
                    while block := stream.read(_BLOCK):
                        digest.update(block)
                        watch.beat()
                self._known[name] = state, digest.hexdigest()
            return self._known[name][1]

        with suppress(FileNotFoundError):
            return self._line.reach(call, f"{self.url}/{name}", "the file cannot be read")
        return None

    def read(self, name: str, most: int) -> bytes | None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "file"
            try:
                self._download(name, file, most, exact=False)
            except FileNotFoundError:
                return None
            return file.read_bytes()

    def fetch(self, files: Sequence[Listed], folder: Path, progress: Progress) -> Iterator[Listed]:
        def one(file: Listed) -> Listed:
            try:
                self._download(file.name, folder / file.name, file.bytes, progress=progress)
            except FileNotFoundError:
                raise not_listed(f"{self.url}/{file.name}", f"{file.bytes:,} bytes", "no file") from None
            return file

        with ThreadPoolExecutor(_AT_A_TIME, "pull") as pool:
            try:
                for future in as_completed([pool.submit(one, file) for file in files]):
                    yield future.result()
            except BaseException:
                self._line.cut.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _download(
        self, name: str, to: Path, size: int, *, exact: bool = True, progress: Progress = lambda done: None
    ) -> None:
        where, path = f"{self.url}/{name}", self._path(name)

        def wrong(found: str) -> NoReturn:
            raise not_listed(where, f"{size:,} bytes" + ("" if exact else " at most"), found)

        def call(watch: Watch) -> None:
            told = self._fs.info(path)["size"]  # None over HTTP without Content-Length
            if told is not None and (told != size if exact else told > size):
                wrong(f"{told:,} bytes")
            moved = _Moved(watch, progress, size, lambda: wrong(f"more than {size:,} bytes"))
            try:
                self._get(path, str(to), callback=moved, **_GET.get(self._kind, {}))
                if exact and (came := to.stat().st_size) != size:
                    raise ConnectionError(f"it ended after {came:,} of {size:,} bytes")
            except BaseException:
                if not watch.given_up:  # else it is perhaps another's by now
                    to.unlink(missing_ok=True)
                    progress(-moved.value)
                raise

        self._line.reach(call, where, "the file cannot be downloaded", recheck=self._fs.async_impl)

    def put(self, files: Sequence[Listed], folder: Path, progress: Progress) -> None:
        if self._kind != "s3":
            for parent in {file.name.rpartition("/")[0] for file in files}:
                self._prepare(self._path(parent).rstrip("/"))
        for file in files:
            self._upload(file, folder / file.name, progress)

    def put_first(self, name: str, content: bytes) -> bool:
        path = self._path(name)

        def call(_watch: Watch) -> bool:
            if self._local:
                return commit_first(Path(path), content)
            try:
                self._fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True

        if self._kind != "s3":
            self._prepare(self._root.rstrip("/"))
        return self._writing(name, call)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._line.reach(
                lambda _: self._fs.rm_file(self._path(name)),
                f"{self.url}/{name}",
                "the file cannot be removed",
            )

    def _upload(self, file: Listed, source: Path, progress: Progress) -> None:
        path = self._path(file.name)
        folder, _, last = path.rpartition("/")
        whole_at_once = self._kind == "s3"
        target = path if whole_at_once else f"{folder}/{temporary_name(last)}"

        def call(watch: Watch) -> None:
            moved = _Moved(watch, progress)
            try:
                self._put(str(source), target, callback=moved, **_PUT.get(self._kind, {}))
                if not whole_at_once:
                    self._name(target, path)
            except FileExistsError:
                progress(file.bytes - moved.value)  # someone was faster; what it is will be compared
            except BaseException:
                progress(-moved.value)
                raise
            finally:
                if not whole_at_once:
                    with suppress(Exception):  # it is gone where it was moved; else a later push removes it
                        self._fs.rm_file(target)

        self._writing(file.name, call)

    def _writing(self, name: str, call: Any) -> Any:
        where = f"{self.url}/{name}"
        try:
            return self._line.reach(call, where, "the file cannot be uploaded")
        except FileNotFoundError as error:
            raise CachekdError(
                "the file cannot be uploaded: there is no such bucket or folder",
                where=where,
                found=str(error.__cause__),
                fix="make it first: none is made for a name that may be mistyped",
            ) from None

    def _name(self, temporary: str, path: str) -> None:
        """Raises FileExistsError if there is a file of that name."""
        if self._local:
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            try:
                return os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:
                pass  # a file system without hard links
        if self._fs.exists(path):
            raise FileExistsError(path)
        self._fs.mv(temporary, path)
        return None

    def _prepare(self, folder: str) -> None:
        """Make a folder, and remove what pushes left in it that are dead."""

        def call(_watch: Watch) -> None:
            if not self._fs.isdir(folder):
                # Elsewhere the parents may be a bucket, made because its name was mistyped.
                with suppress(FileExistsError):
                    self._fs.mkdir(folder, create_parents=self._local)
            for entry in self._fs.ls(folder, detail=True):
                path = Path(entry["name"])
                if is_temporary(path) and is_stale(path.name, _modified(entry)):
                    with suppress(FileNotFoundError):
                        self._fs.rm_file(entry["name"])

        self._writing("", call)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


class _Moved(Callback):
    """Tells of bytes as they move, and stops a transfer that has had too many, or that nobody waits for."""

    def __init__(self, watch: Watch, progress: Progress, most: int | None = None, over: Any = None) -> None:
        super().__init__()
        self._watch, self._progress, self._most, self._over = watch, progress, most, over

    def relative_update(self, inc: int = 1) -> None:
        self._watch.beat()
        if self._most is not None and self.value + inc > self._most:
            self._over()
        self.value += inc
        self._progress(inc)


def _options(kind: str, timeout: float) -> dict[str, Any]:
    """Clients of whose patience ours would not know: `reach` ends a stall before they do."""
    if kind == "http":
        limits = aiohttp.ClientTimeout(total=None, sock_connect=2 * timeout, sock_read=2 * timeout)
        return {"client_kwargs": {"timeout": limits}}
    if kind == "s3":
        limit = {"connect_timeout": 2 * timeout, "read_timeout": 2 * timeout}
        return {"config_kwargs": {**limit, "retries": {"total_max_attempts": 1}}}
    return {}


def _modified(entry: dict[str, Any]) -> float:
    """When a file was; where its file system does not tell, never: only a dead process's is removed then."""
    times = (entry.get(name) for name in ("mtime", "LastModified", "created"))
    time = next((time for time in times if time is not None), float("inf"))
    return time.timestamp() if isinstance(time, datetime) else float(time)
