"""A cache somewhere else, as a folder on this disk."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock

from cachekd.cache.files import make_folder
from cachekd.cache.manifest import MANIFEST_FILE
from cachekd.errors import CachekdError
from cachekd.sharing.contents import listed_files
from cachekd.sharing.pull import Published, pull_from, read_published
from cachekd.sharing.store import Progress, open_store


def cache_home() -> Path:
    """Where fetched caches are kept: $CACHEKD_HOME, or cachekd in the user's folder for such things."""
    if home := os.environ.get("CACHEKD_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cachekd"


def local_folder(
    address: str,
    *,
    progress: Progress = lambda done: None,
    total: Progress = lambda size: None,
) -> Path:
    """Fetch a published cache if it is not here yet, all of it, and verified.

    The folder is named by the manifest's checksum: a cache that changes where it lies is another folder, and
    the old one stays. Several processes may ask for one at the same time; one of them fetches it.

    Args:
        address: `hf://datasets/org/name[@revision]`, or a URL for fsspec.
        progress, total: as for `pull_cache`.

    Raises:
        CachekdError: as `pull_cache`; or the cache is here, but not as it was fetched. The store has to be
            reached even if the cache is here, to know that it is the same.
    """
    store = open_store(address)
    published = read_published(store)
    name = store.url.rpartition("/")[2].partition("@")[0] or "cache"
    folder = cache_home() / f"{name}-{str(published.manifest.sha256)[:16]}"
    make_folder(folder.parent)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if (folder / MANIFEST_FILE).is_file():
            _require_as_fetched(folder, address, published)
        else:
            pull_from(store, folder, published, progress=progress, total=total)
    return folder


def _require_as_fetched(folder: Path, address: str, published: Published) -> None:
    """By sizes: checksums are compared as each file is read.

    Raises:
        CachekdError: the manifest is not the published one, or a file has another size.
    """
    if (folder / MANIFEST_FILE).read_bytes() != published.content:
        raise CachekdError(
            "a fetched cache is no longer what is published",
            where=str(folder / MANIFEST_FILE),
            expected=f"the manifest of {address}",
            found="another, written after it was fetched",
            fix=f"remove {folder}, and it is fetched anew; or name that folder in the address's place",
        )
    for file in listed_files(published.manifest):
        path = folder / file.name
        size = path.stat().st_size if path.is_file() else None
        if size != file.bytes:
            raise CachekdError(
                "a fetched file is missing" if size is None else "a fetched file was cut short or changed",
                where=str(path),
                expected=f"{file.bytes:,} bytes",
                found="no file" if size is None else f"{size:,} bytes",
                fix=f"cachekd pull {address} {folder}",
            )
