"""The folder of a pull: begun, gone on with, finished; what is in it by mistake is left alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cachekd.cache.build import SHARD_FOLDER
from cachekd.cache.files import commit, make_folder
from cachekd.cache.manifest import MANIFEST_FILE
from cachekd.errors import CachekdError
from cachekd.sharing.contents import Listed

PULL_FOLDER = ".pull"


def begin(out: Path, content: bytes) -> bool:
    """Mark the folder as a pull of this manifest; False if that is finished already.

    Raises:
        CachekdError: it holds something else.
    """
    note = out / PULL_FOLDER / MANIFEST_FILE
    for found in (out / MANIFEST_FILE, note):
        if found.is_file() and found.read_bytes() != content:
            raise CachekdError(
                "the folder holds another cache, or another part of this one",
                where=str(out),
                expected="a new or empty folder: nothing is ever overwritten",
                fix="choose another folder; parts can be joined with `cachekd merge`",
            )
    if (out / MANIFEST_FILE).is_file():
        return False
    if out.exists() and not note.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CachekdError(
            "the folder for the cache already holds something",
            where=str(out),
            expected="a new or empty folder, or one of a pull that was cut short",
            fix="choose another folder",
        )
    prepare(out, content)
    return True


def prepare(out: Path, content: bytes) -> None:
    """Make what files are fetched into.

    Raises:
        CachekdError: the folder cannot be written.
    """
    make_folder(out / SHARD_FOLDER)
    make_folder(out / PULL_FOLDER / SHARD_FOLDER)
    commit(out / PULL_FOLDER / MANIFEST_FILE, content)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Two processes that write one file would spoil it for each other.

    Raises:
        CachekdError: another one is at it.
    """
    try:
        with FileLock(out / PULL_FOLDER / "lock", timeout=0):
            yield
    except Timeout:
        raise CachekdError(
            "another process is fetching into this folder", where=str(out), fix="wait for it, then try again"
        ) from None


def require_space(out: Path, files: Sequence[Listed]) -> None:
    """Refuse before anything is fetched.

    Raises:
        CachekdError: what is missing does not fit on the disk.
    """
    needed = sum(file.bytes for file in files if not (out / file.name).exists())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise CachekdError(
            "the disk has no room for the cache",
            where=str(out),
            expected=f"{needed:,} bytes free",
            found=f"{free:,} bytes",
            fix="choose another folder, or fetch a part: --shards 0-9",
        )
