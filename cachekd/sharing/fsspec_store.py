"""A folder at a URL: s3://, gs://, file://, memory://, https:// (to read), and whatever else fsspec knows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from cachekd.sharing.store import Progress, reaching

_BLOCK = 2**20


class FsspecStore:
    """See `cachekd.sharing.store.Store`.

    Args:
        url: of the folder; it does not have to exist.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs: Any
        self._fs, self._root = url_to_fs(self.url)

    def size(self, name: str) -> int | None:
        with reaching(f"{self.url}/{name}", "the store cannot be asked for a file"):
            try:
                info = self._fs.info(self._path(name))
            except FileNotFoundError:
                return None
            return None if info["size"] is None else int(info["size"])

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with (
            reaching(f"{self.url}/{name}", "the file cannot be read"),
            self._fs.open(self._path(name), "rb") as stream,
        ):
            while block := stream.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def fetch(self, name: str, to: Path, size: int) -> None:
        done = to.stat().st_size if to.exists() else 0
        if done > size:
            to.unlink()
            done = 0
        with (
            reaching(f"{self.url}/{name}", "the file cannot be downloaded"),
            self._fs.open(self._path(name), "rb") as source,
            to.open("ab") as target,
        ):
            if done:
                source.seek(done)
            while done < size and (block := source.read(min(_BLOCK, size - done))):
                target.write(block)
                done += len(block)

    def put(self, files: Mapping[str, Path], progress: Progress) -> None:
        for name, file in files.items():
            with reaching(f"{self.url}/{name}", "the file cannot be uploaded"):
                self._put(name, file)
            progress(file.stat().st_size)

    def _put(self, name: str, file: Path) -> None:
        # Some of these file systems show a file while it is written, so it gets its name when it is whole.
        path = self._path(name)
        folder, _, last = path.rpartition("/")
        part = f"{folder}/.{last}.part"
        if not self._fs.isdir(folder):
            # Elsewhere than on this machine the parents may be a bucket, made because its name was mistyped.
            self._fs.mkdir(folder, create_parents=isinstance(self._fs, LocalFileSystem))
        self._fs.put_file(str(file), part)
        self._fs.mv(part, path)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
