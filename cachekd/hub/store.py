"""A store, by its address."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from cachekd.config.fields import STORE_TIMEOUT
from cachekd.errors import CachekdError
from cachekd.hub.transfer import Listed, Progress, reach
from cachekd.paths import HUB_CACHE, is_path

FORMS = (
    "hf://datasets/org/name[@revision] on the Hugging Face hub, or org/name where no folder org is here; a "
    "URL that fsspec knows, such as s3://bucket/caches/llava; or a folder on this disk, such as ./llava"
)


class OtherContent(CachekdError):
    """What is there is not what this push brings."""


class Store(Protocol):
    """A folder somewhere else. Names are paths in it, such as `shards/00000.zarr.zip`."""

    url: str

    def look(self) -> None:
        """Forget what is known: what is asked from here on is what is there now."""
        ...

    def sha256(self, name: str) -> str | None:
        """The checksum of a file, None where there is none; a store that keeps none reads the file."""
        ...

    def read(self, name: str, most: int) -> bytes | None:
        """Read a small file; None where there is none.

        Raises:
            CachekdError: it has more bytes than `most`.
        """
        ...

    def fetch(self, files: Sequence[Listed], folder: Path, progress: Progress) -> Iterator[Listed]:
        """Download files to their names in `folder`, in any order; yields each when it is there.

        Raises:
            CachekdError: there is no such file, or it has another size: that is known at its first block
                where the store tells sizes, and at the first block too many where it does not.
        """
        ...

    def put(self, files: Sequence[Listed], folder: Path, progress: Progress) -> None:
        """Upload files from `folder`. Each is there as a whole or not at all, and none is overwritten: where
        something was put there since `look`, it stays, and on the hub nothing more is put."""
        ...

    def put_first(self, name: str, content: bytes) -> bool:
        """Make a small file if there is none; on the hub, only if nothing changed since `look`.

        Returns:
            whether it was made.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file that this process made."""
        ...


def holds(store: Store, file: Listed) -> bool:
    """Whether the store has this file.

    Raises:
        OtherContent: it has another one under its name.
    """
    found = store.sha256(file.name)
    if found not in (None, file.sha256):
        raise OtherContent(
            "the store holds another file under this name, and nothing is ever overwritten",
            where=f"{store.url}/{file.name}",
            expected=f"no file, or one with sha256 {file.sha256}",
            found=f"one with sha256 {found}",
            fix="publish under another name (or --revision), or remove what is there",
        )
    return found is not None


def open_store(address: str, *, revision: str | None = None, timeout: float = STORE_TIMEOUT) -> Store:
    """The store that an address means; nothing is asked of it yet. What begins as a path on this disk is one.

    Args:
        timeout: seconds without a byte after which it is given up.

    Raises:
        CachekdError: it is no such address.
    """
    from cachekd.hub.fsspec_store import FsspecStore
    from cachekd.hub.hub_store import HubStore

    if "://" not in address and is_path(address):
        address = f"file://{os.path.abspath(address)}"
    if hub := HUB_CACHE.fullmatch(address.removeprefix("hf://datasets/")):
        named = hub[2]
        if named is not None and revision is not None and named != revision:
            raise CachekdError("two revisions are named", where=address, found=f"--revision {revision}")
        return HubStore(hub[1], named if revision is None else revision, timeout)
    if "://" not in address or address.startswith("hf://"):
        raise CachekdError(
            "this is no address of a cache", where=address, expected=FORMS, fix=_advice(address)
        )
    if revision is not None:
        raise CachekdError("only repositories of the hub have revisions", where=address, found=revision)
    return reach(lambda: FsspecStore(address, timeout), address, "the address cannot be used")


def _advice(address: str) -> str | None:
    if address.startswith("hf://"):
        return "a cache is the whole of a data set repository: hf://datasets/org/name"
    return f"for a folder on this disk: ./{address}"
