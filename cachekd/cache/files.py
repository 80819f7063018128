"""A file is either whole on disk or not there."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cachekd.errors import CachekdError

_FIXES = {
    errno.ENOSPC: "free some space, then run the same command again: what is finished stays",
    errno.EDQUOT: "free some of your quota, then run the same command again: what is finished stays",
    errno.EROFS: "choose an --out on a file system that can be written",
    errno.EACCES: "choose an --out that you may write to, or change its permissions",
}
_HOST = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())


def commit(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to the disk, then rename: a crash leaves the old file or none.

    Raises:
        CachekdError: the disk is full, or the folder cannot be written.
    """
    with _beside(path, content) as temporary:
        temporary.replace(path)


def commit_first(path: Path, content: bytes) -> bool:
    """Like `commit`, but the first one wins, of whatever process on whatever machine.

    Returns:
        whether it was this one; otherwise the file is as it was.
    """
    if path.exists():
        return False
    with _beside(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
            temporary.replace(path)
    return True


@contextmanager
def _beside(path: Path, content: bytes) -> Iterator[Path]:
    """The content on the disk under a temporary name, for as long as the block runs."""
    temporary = path.with_name(f".{path.name}.tmp-{_HOST}-{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):  # where a file system went read-only, `remove_stale` has to see to it
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """The folder and its parents.

    Raises:
        CachekdError: it cannot be made, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> CachekdError:
    """What to tell the user of a failed write."""
    return CachekdError(
        "a file cannot be written",
        where=str(path),
        found=error.strerror or str(error),
        fix=_FIXES.get(error.errno or 0, "mend what the system says, then run the same command again"),
    )


def remove_stale(folder: Path) -> None:
    """Remove temporary files of processes of this machine that are gone."""
    for path in folder.glob(f".*.tmp-{_HOST}-*"):
        process = path.name.rpartition("-")[2]
        if process.isdigit() and not _alive(int(process)):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # alive, and someone else's
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
