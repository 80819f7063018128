"""Where published caches lie. What a store must do, and which one an address means."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cachekd.errors import CachekdError
from cachekd.paths import HUB_CACHE, is_path

Progress = Callable[[int], None]  # is told of bytes that are done

FORMS = (
    "hf://datasets/org/name[@revision] on the Hugging Face hub, or org/name where no folder org is here; a "
    "URL that fsspec knows, such as s3://bucket/caches/llava; or a folder on this disk, such as ./llava"
)


class Store(Protocol):
    """A folder somewhere else. Names are paths in it, such as `shards/00000.zarr.zip`."""

    url: str

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        ...

    def sha256(self, name: str) -> str:
        """Of a file that is there; a store that keeps no such checksum reads the file."""
        ...

    def fetch(self, name: str, to: Path, size: int) -> None:
        """Download a file of `size` bytes. What `to` holds already is taken for its beginning, or discarded;
        never more than `size` bytes of it are written."""
        ...

    def put(self, files: Mapping[str, Path], progress: Progress) -> None:
        """Upload files, each of which is there as a whole or not at all."""
        ...


def open_store(address: str, *, revision: str | None = None) -> Store:
    """The store that an address means; nothing is asked of it yet. What begins as a path on this disk is one.

    Raises:
        CachekdError: it is no such address.
    """
    from cachekd.sharing.fsspec_store import FsspecStore
    from cachekd.sharing.hub_store import HubStore

    if "://" not in address and is_path(address):
        address = f"file://{os.path.abspath(address)}"
    if hub := HUB_CACHE.fullmatch(address.removeprefix("hf://datasets/")):
        named = hub[2]
        if named is not None and revision is not None and named != revision:
            raise CachekdError("two revisions are named", where=address, found=f"--revision {revision}")
        return HubStore(hub[1], named if revision is None else revision)
    if "://" not in address or address.startswith("hf://"):
        raise CachekdError(
            "this is no address of a cache", where=address, expected=FORMS, fix=_advice(address)
        )
    if revision is not None:
        raise CachekdError("only repositories of the hub have revisions", where=address, found=revision)
    with reaching(address, "the address cannot be used"):
        return FsspecStore(address)


def _advice(address: str) -> str | None:
    if address.startswith("hf://"):
        return "a cache is the whole of a data set repository: hf://datasets/org/name"
    return f"for a folder on this disk: ./{address}"


@contextmanager
def reaching(url: str, problem: str) -> Iterator[None]:
    """Turn whatever a client library raises into a CachekdError that names the address.

    Raises:
        CachekdError: the block raised, with the problem given.
    """
    try:
        yield
    except (CachekdError, MemoryError):
        raise
    except ImportError as error:
        raise CachekdError(
            "a package is missing that reads such addresses", where=url, found=str(error), fix=str(error)
        ) from None
    except Exception as error:
        # Each client library has its own: OSError, httpx's, botocore's, RuntimeError around any of them.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        first = str(cause).strip().split("\n")[0]
        raise CachekdError(
            problem,
            where=url,
            found=f"{type(cause).__name__}: {first}",
            fix="mend what it says, then run the same command again: what is finished stays",
        ) from error
