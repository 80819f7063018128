"""A cache somewhere else, as a folder on this disk."""

from __future__ import annotations

import os
from pathlib import Path

from cachekd.cache.manifest import MANIFEST_FILE
from cachekd.errors import CachekdError
from cachekd.lock import alone
from cachekd.paths import is_address
from cachekd.sharing.contents import listed_files
from cachekd.sharing.moved import Progress, untold
from cachekd.sharing.pull import Published, fetch_into, read_published
from cachekd.sharing.store import open_store

_PATIENCE = 24 * 3600.0  # seconds that processes of one training wait for the one that fetches


def cache_home() -> Path:
    """Where fetched caches are kept: $CACHEKD_HOME, or cachekd in the user's folder for such things."""
    if home := os.environ.get("CACHEKD_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cachekd"


def local_folder(
    address: str | Path,
    *,
    progress: Progress = untold,
    total: Progress = untold,
) -> Path:
    """Fetch a published cache if it is not here yet, all of it, and verified.

    The folder is named by the manifest's checksum: a cache that changes where it lies is another folder, and
    the old one stays. Several processes may ask for one at the same time; one of them fetches it.

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
        total(sum(file.bytes for file in listed_files(published.manifest)))
        with alone(folder, "is fetching into", patience=_PATIENCE):
            if not (folder / MANIFEST_FILE).is_file():
                fetch_into(store, folder, published, progress)
    _require_as_fetched(folder, str(address), published)
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
