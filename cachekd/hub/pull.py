"""Fetch a published cache, or some of its shards. Nothing has its name before its content was verified.

OUT/.pull/manifest.json     what is being fetched; gone when the cache is whole
OUT/.pull/shards/...        files under way
OUT/shards/...              verified
OUT/manifest.json           last: the folder is a cache
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cachekd.atomic import commit, free_space, make_folder, sync_folder
from cachekd.cache.layout import SHARD_FOLDER
from cachekd.cache.manifest import Fidelity, ListedFile, Manifest
from cachekd.cache.reader import require_sizes
from cachekd.cache.sealed import MOST_JSON
from cachekd.cache.verify import problem_of
from cachekd.config.fields import STORE_TIMEOUT
from cachekd.errors import CachekdError, cannot_write
from cachekd.hub.store import Progress, Store, not_listed, open_store, untold
from cachekd.lock import alone, entries, require_new_folder
from cachekd.paths import MANIFEST_FILE, cache_home, is_address

PULL_FOLDER = ".pull"
_PATIENCE = 24 * 3600.0  # seconds that processes of one training wait for the one that fetches


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
    timeout: float = STORE_TIMEOUT,
    progress: Progress = untold,
    total: Progress = untold,
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
    out = Path(out)
    store = open_store(address, revision=revision, timeout=timeout)
    published = read_published(store)
    if shards is not None:
        part = some_shards(published.manifest, shards, store.url)
        published = Published(part, part.to_json())
    files = published.manifest.files
    total(sum(file.bytes for file in files))
    _require_ours(out, published)
    fetched: Sequence[ListedFile] = []
    # What is finished may be where nobody may write.
    if not ((out / MANIFEST_FILE).is_file() and all(_is_whole(out, file) for file in files)):
        with alone(out, "is fetching into"):
            fetched = fetch_into(store, out, published, progress)
    size = sum(file.bytes for file in fetched)
    return Pulled(out, published.manifest, len(fetched), len(files) - len(fetched), size)


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


def some_shards(manifest: Manifest, wanted: str, where: str) -> Manifest:
    """The manifest of a part. Shards keep their names, so that parts can be told apart and merged.

    Raises:
        CachekdError: it is no list of shards, or not of this cache.
    """
    count = len(manifest.shards)
    places: set[int] = set()
    for piece in wanted.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < count:
            raise CachekdError(
                "--shards is no list of this cache's shards",
                where=where,
                expected=f"numbers from 0 to {count - 1}, such as 0-9 or 0-3,7",
                found=wanted,
            )
        places |= set(range(first, last + 1))
    chosen = [info for place, info in enumerate(manifest.shards) if place in places]
    fidelity = Fidelity.of_all(info.fidelity for info in chosen)
    part = manifest.model_copy(update={"shards": chosen, "fidelity": fidelity})
    return Manifest.model_validate_json(part.to_json())  # with its own seal


def fetch_into(store: Store, out: Path, published: Published, progress: Progress) -> Sequence[ListedFile]:
    """Fetch what is not there yet, into a folder that this process holds.

    Raises:
        CachekdError: what the store has is not what the manifest lists; the folder holds something else,
            cannot be written, or its disk has no room.
    """
    _require_ours(out, published)
    make_folder(out / PULL_FOLDER / SHARD_FOLDER)
    commit(out / PULL_FOLDER / MANIFEST_FILE, published.content)  # before anything else is there
    make_folder(out / SHARD_FOLDER)
    missing = []
    for file in published.manifest.files:
        if _is_whole(out, file):
            progress(file.bytes)
        else:
            missing.append(file)
    _require_space(out, missing)
    for file in store.fetch(missing, out / PULL_FOLDER, progress):
        _name_verified(out, file, store.url)
    for folder in (out / SHARD_FOLDER, out):
        sync_folder(folder)
    commit(out / MANIFEST_FILE, published.content)
    shutil.rmtree(out / PULL_FOLDER, ignore_errors=True)
    return missing


def _require_ours(out: Path, published: Published) -> None:
    """Refuse a folder that is neither new nor of a pull of this manifest."""
    there = [path for path in (out / MANIFEST_FILE, out / PULL_FOLDER / MANIFEST_FILE) if path.is_file()]
    if any(path.read_bytes() != published.content for path in there):
        raise CachekdError(
            "the folder holds another cache, or another part of this one",
            where=str(out),
            expected="a new or empty folder: nothing is ever overwritten",
            fix="choose another folder; parts can be joined with `cachekd merge`",
        )
    if not there and not (out.is_dir() and {path.name for path in entries(out)} == {PULL_FOLDER}):
        require_new_folder(out, "cache")


def _require_space(out: Path, files: Sequence[ListedFile]) -> None:
    """Refuse files that do not fit on the disk."""
    needed = sum(file.bytes for file in files)
    _, free = free_space(out)
    if needed > free:
        raise CachekdError(
            "the disk has no room for the cache",
            where=str(out),
            expected=f"{needed:,} bytes free",
            found=f"{free:,} bytes",
            fix="choose another folder, or fetch a part: --shards 0-9",
        )


def _name_verified(out: Path, file: ListedFile, url: str) -> None:
    part, target = out / PULL_FOLDER / file.name, out / file.name
    if (problem := problem_of(part, file)) is not None:
        part.unlink()
        raise not_listed(f"{url}/{file.name}", f"sha256 {file.sha256}", f"it {problem}")
    try:
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
    except OSError as error:
        raise cannot_write(target, error) from None


def _is_whole(out: Path, file: ListedFile) -> bool:
    return problem_of(out / file.name, file) is None


def local_folder(
    address: str | Path,
    *,
    progress: Progress = untold,
    total: Progress = untold,
) -> Path:
    """Fetch a published cache if it is not here yet, all of it, and verified.

    The folder's name is the manifest's checksum. So if the published cache changes, it gets another folder,
    and the old one stays. Several processes may ask for a cache at the same time; one of them fetches it.

    Args:
        address: `hf://datasets/org/name[@revision]`, or a URL for fsspec; a folder on this disk is its own.
        progress, total: as for `pull_cache`.

    Raises:
        CachekdError: as `pull_cache`; or the cache is here, but not as it was fetched. The store has to be
            reached even if the cache is here, to know that it is the same.
    """
    if not is_address(address):
        return Path(address)
    store = open_store(str(address))
    published = read_published(store)
    name = store.url.rpartition("/")[2].partition("@")[0] or "cache"
    folder = cache_home() / f"{name}-{str(published.manifest.sha256)[:16]}"
    if not (folder / MANIFEST_FILE).is_file():  # the last to be there
        total(sum(file.bytes for file in published.manifest.files))
        with alone(folder, "is fetching into", patience=_PATIENCE):
            if not (folder / MANIFEST_FILE).is_file():
                fetch_into(store, folder, published, progress)
    if (folder / MANIFEST_FILE).read_bytes() != published.content:
        raise CachekdError(
            "a fetched cache is no longer what is published",
            where=str(folder / MANIFEST_FILE),
            expected=f"the manifest of {address}",
            found="another, written after it was fetched",
            fix=f"remove {folder}, and it is fetched anew; or name that folder in the address's place",
        )
    # Checksums are compared as each file is read.
    require_sizes(
        folder,
        published.manifest.files,
        f"cachekd pull {address} {folder}",
        missing="a fetched file is missing",
        changed="a fetched file was cut short or changed",
    )
    return folder
