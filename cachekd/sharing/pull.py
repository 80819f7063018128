"""Fetch a published cache, or some of its shards. Nothing has its name before its content was verified.

OUT/.pull/manifest.json     what is being fetched; gone when the cache is whole
OUT/.pull/shards/...        files under way
OUT/shards/...              verified
OUT/manifest.json           last: the folder is a cache
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cachekd.cache.build import SHARD_FOLDER
from cachekd.cache.files import cannot_write, commit, sync_folder
from cachekd.cache.manifest import MANIFEST_FILE, Manifest
from cachekd.cache.sealed import MOST_JSON
from cachekd.errors import CachekdError
from cachekd.sharing.contents import Listed, listed_files, not_listed, some_shards
from cachekd.sharing.pull_folder import PULL_FOLDER, alone, begin, prepare, require_space
from cachekd.sharing.reach import TIMEOUT
from cachekd.sharing.store import Progress, Store, open_store


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
    timeout: float = TIMEOUT,
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
        timeout: seconds without a byte after which the store is given up.
        progress: is told of bytes as they come.
        total: is told once how many bytes that will be.

    Raises:
        CachekdError: there is no cache, a file is not what its manifest lists, or `out` holds something else.
    """
    store = open_store(address, revision=revision, timeout=timeout)
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
    content = store.read(MANIFEST_FILE, MOST_JSON)
    if content is None:
        raise CachekdError(
            "this is not a cache, or it is not yet published as a whole",
            where=store.url,
            expected=MANIFEST_FILE,
            found="no such file",
            fix="check the address; a push that was cut short goes on when its command is repeated",
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST_FILE).write_bytes(content)
        try:
            return Published(Manifest.load(folder), content)
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
    """Returns the files that were not there yet.

    Raises:
        CachekdError: what the store has is not what the manifest lists.
    """
    require_space(out, files)
    missing = []
    for file in files:
        if _is_whole(out, file):
            progress(file.bytes)
        else:
            missing.append(file)
    for file in store.fetch(missing, out / PULL_FOLDER, progress):
        part, target = out / PULL_FOLDER / file.name, out / file.name
        if (sha256 := _sha256(part)) != file.sha256:
            part.unlink()
            raise not_listed(f"{store.url}/{file.name}", f"sha256 {file.sha256}", f"sha256 {sha256}")
        try:
            with part.open("rb+") as stream:
                os.fsync(stream.fileno())
            part.replace(target)
        except OSError as error:
            raise cannot_write(target, error) from None
    return missing


def _is_whole(out: Path, file: Listed) -> bool:
    target = out / file.name
    return target.is_file() and _sha256(target) == file.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
