"""Fetch a published cache, or some of its shards. Nothing has its name before its content was verified.

OUT/.pull/manifest.json     what is being fetched; gone when the cache is whole
OUT/.pull/<sha256>.part     a file under way
OUT/shards/...              verified
OUT/manifest.json           last: the folder is a cache
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cachekd.cache.build import SHARD_FOLDER
from cachekd.cache.files import cannot_write, commit, sync_folder
from cachekd.cache.manifest import MANIFEST_FILE, Manifest
from cachekd.cache.sealed import MOST_JSON
from cachekd.errors import CachekdError
from cachekd.sharing.contents import Listed, listed_files, some_shards
from cachekd.sharing.pull_folder import PULL_FOLDER, alone, begin, prepare, require_space
from cachekd.sharing.store import Progress, Store, open_store

_AT_A_TIME = 4


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Attributes:
        out: the cache's folder.
        manifest: of what is in it.
        fetched, kept: files that were downloaded, and that were there already.
        bytes: of what was downloaded.
    """

    out: Path
    manifest: Manifest
    fetched: int
    kept: int
    bytes: int


def pull_cache(
    address: str,
    out: str | Path,
    *,
    shards: str | None = None,
    revision: str | None = None,
    progress: Progress = lambda done: None,
    total: Progress = lambda size: None,
) -> Pulled:
    """Download a cache and verify every file of it; the same call goes on after an interruption, and fetches
    again what was lost or damaged since.

    Args:
        address: as for `push_cache`.
        out: a new or empty folder, or the one of a pull that was cut short.
        shards: which of them, by place in the manifest: `0-9`, `0-3,7`; None: all. The result is a cache of
            its own, whose manifest lists only these and says as before where they come from.
        revision: for the hub.
        progress: is told of bytes as files are done.
        total: is told once how many bytes that will be.

    Raises:
        CachekdError: there is no cache, a file is not what its manifest lists, or `out` holds something else.
    """
    store = open_store(address, revision=revision)
    return pull_from(store, Path(out), read_published(store), shards=shards, progress=progress, total=total)


class Published(NamedTuple):
    """A published manifest, and the bytes that say it: another version may have written them."""

    manifest: Manifest
    content: bytes


def read_published(store: Store) -> Published:
    """The manifest of a published cache.

    Raises:
        CachekdError: there is none, or it cannot be read.
    """
    size = store.size(MANIFEST_FILE)
    if size is None or size > MOST_JSON:
        raise CachekdError(
            "this is not a cache, or it is not yet published as a whole",
            where=store.url,
            expected=MANIFEST_FILE,
            found="no such file" if size is None else f"{size:,} bytes",
            fix="check the address; a push that was cut short goes on when its command is repeated",
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / MANIFEST_FILE
        store.fetch(MANIFEST_FILE, file, size)
        try:
            return Published(Manifest.load(file.parent), file.read_bytes())
        except CachekdError as error:
            where, fix = f"{store.url}/{MANIFEST_FILE}", "tell who published it"
            raise CachekdError(
                error.problem, where=where, expected=error.expected, found=error.found, fix=fix
            ) from None


def pull_from(
    store: Store,
    out: Path,
    published: Published,
    *,
    shards: str | None = None,
    progress: Progress = lambda done: None,
    total: Progress = lambda size: None,
) -> Pulled:
    """`pull_cache` with the store open and its manifest read."""
    manifest, content = published
    if shards is not None:
        manifest = some_shards(manifest, shards, store.url)
        content = manifest.to_json()
    files = listed_files(manifest)
    total(sum(file.bytes for file in files))
    if not begin(out, content):
        if all(_is_whole(out, file) for file in files):
            return Pulled(out, manifest, 0, len(files), 0)
        prepare(out, content)  # a file was lost or damaged since: it is fetched again
    with alone(out):
        fetched = _fetch_all(store, out, files, progress)
        for folder in (out / SHARD_FOLDER, out):
            sync_folder(folder)
        commit(out / MANIFEST_FILE, content)
        shutil.rmtree(out / PULL_FOLDER, ignore_errors=True)
    return Pulled(out, manifest, len(fetched), len(files) - len(fetched), sum(file.bytes for file in fetched))


def _fetch_all(store: Store, out: Path, files: Sequence[Listed], progress: Progress) -> list[Listed]:
    """Returns the files that were not there yet."""
    require_space(out, files)
    fetched = []
    with ThreadPoolExecutor(_AT_A_TIME, "pull") as pool:
        futures = {pool.submit(_fetch, store, out, file): file for file in files}
        try:
            for future in as_completed(futures):
                if future.result():
                    fetched.append(futures[future])
                progress(futures[future].bytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return fetched


def _fetch(store: Store, out: Path, file: Listed) -> bool:
    """Whether it had to be downloaded.

    Raises:
        CachekdError: what the store has is not what the manifest lists.
    """
    target = out / file.name
    if _is_whole(out, file):
        return False
    where = f"{store.url}/{file.name}"
    size = store.size(file.name)
    if size != file.bytes:
        raise _not_listed(where, f"{file.bytes:,} bytes", "no file" if size is None else f"{size:,} bytes")
    part = out / PULL_FOLDER / f"{file.sha256}.part"
    store.fetch(file.name, part, file.bytes)
    if (found := part.stat().st_size) < file.bytes:
        raise CachekdError(
            "a download was cut short",
            where=where,
            expected=f"{file.bytes:,} bytes",
            found=f"{found:,} bytes",
            fix="run the same command again: what is finished stays",
        )
    if (sha256 := _sha256(part)) != file.sha256:
        part.unlink()
        raise _not_listed(where, f"sha256 {file.sha256}", f"sha256 {sha256}")
    try:
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
    except OSError as error:
        raise cannot_write(target, error) from None
    return True


def _is_whole(out: Path, file: Listed) -> bool:
    target = out / file.name
    return target.is_file() and _sha256(target) == file.sha256


def _not_listed(where: str, expected: str, found: str) -> CachekdError:
    return CachekdError(
        "a published file is not the one that the manifest lists",
        where=where,
        expected=expected,
        found=found,
        fix="run the same command again; if it stays so, tell who published it: the files were changed",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
