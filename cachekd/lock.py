"""Who works in a folder: one process at a time; and a folder that is there as a whole or not at all.

The lock is the system's (`flock`): the kernel lets go of it when its process ends, however it does. Some
network file systems have none. There the holder renews a mark every few seconds instead, and whoever waits
takes it over once it has not been renewed for a minute: one that died elsewhere costs the next that minute.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from cachekd.atomic import (
    make_folder,
    refuse_address,
    remove_stale,
    require_room_for,
    sync_folder,
    temporary_name,
)
from cachekd.errors import CachekdError, FailedWrite, cannot_write

LOCK_FILE, LEASE_FILE = ".cachekd.lock", ".cachekd.lease"

_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # the last two are one on Linux
_LEASE, _GRACE = 60.0, 5.0  # seconds


class Held(CachekdError):
    """Another process holds the folder."""


@contextmanager
def alone(folder: Path, doing: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder for as long as the block runs. One that is made for it goes again if it stays empty.

    Args:
        doing: what another process does where it is refused, such as "trains in".
        patience: seconds to wait for another process.

    Raises:
        Held: another process holds it: which, and since when.
        CachekdError: the folder cannot be written.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    note = folder / LOCK_FILE
    try:
        lock = _acquired(note, patience)
    except Timeout:
        if not note.exists():  # filelock waits as well where no file can be made, as in /proc
            require_room_for(folder)
        raise Held(
            f"another process {doing} this folder",
            where=str(folder),
            found=_holder(note),
            fix="wait for it, or stop it; or choose another folder",
        ) from None
    except OSError as error:
        raise cannot_write(note, error) from None
    try:
        with suppress(OSError):  # on a full disk nobody is told who holds it
            note.write_text(json.dumps(this_process()))
        yield
    finally:
        with suppress(OSError):  # before the release: afterwards it may be somebody else's
            note.unlink()
        lock.release()
        with suppress(OSError):  # folders that are not empty stay
            for path in made:
                path.rmdir()


def _acquired(path: Path, patience: float) -> BaseFileLock:
    make_folder(path.parent)
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except FileNotFoundError:  # whoever made the folder has left it empty, and it went
        return _acquired(path, patience)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        lock = SoftFileLease(path.with_name(LEASE_FILE), lease_duration=_LEASE)
        lock.acquire(timeout=max(patience, _LEASE + _GRACE))
    return lock


def this_process() -> dict[str, str | int]:
    """What a holder writes of itself."""
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": now}


def said(note: bytes) -> str:
    """What a holder has written, for a message."""
    try:
        who = json.loads(note)
        return f"process {who['process']} on {who['host']}, since {who['since']}"
    except (ValueError, TypeError, KeyError):  # it has only just begun, or its disk is full
        return "a process that has not said which it is"


def _holder(note: Path) -> str:
    try:
        return said(note.read_bytes())
    except OSError:
        return said(b"")


def entries(folder: Path) -> list[Path]:
    """List what is in a folder, in order, but for the lock of whoever works there."""
    return sorted(path for path in folder.iterdir() if path.name not in (LOCK_FILE, LEASE_FILE))


def holds_something(path: Path) -> bool:
    """Whether it is a file, or a folder that is not empty."""
    return path.exists() and not (path.is_dir() and not entries(path))


def require_new_folder(path: Path, what: str, or_else: str = "") -> None:
    """Refuse to write into a folder that holds something.

    Args:
        what: it is for.
        or_else: what else would do, for the message.

    Raises:
        CachekdError: `path` exists and is not an empty folder.
    """
    if holds_something(path):
        raise CachekdError(
            f"the folder for the {what} already holds something",
            where=str(path),
            expected=f"a new or empty folder{or_else}: nothing is ever overwritten",
            found=", ".join(inside.name for inside in entries(path)[:5]) if path.is_dir() else "a file",
            fix="choose another --out, or remove the folder",
        )


@contextmanager
def staged_folder(out: str | Path, what: str, *, last: str) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block has run, and vanishes when it fails.

    Args:
        what: it is for, in error messages.
        last: the file that says that all others are there.

    Raises:
        CachekdError: `out` holds something, or cannot be written.
    """
    out = Path(out)
    refuse_address(out)
    out = out.resolve()  # "." has no name
    require_new_folder(out, what)
    staging = out.with_name(temporary_name(out.name))
    make_folder(staging)
    remove_stale(out.parent, out.name)
    try:
        yield staging
        sync_folder(staging)
        if out.exists():  # it stays: it may be a mount, or where someone stands
            with alone(out, "writes into"):
                require_new_folder(out, what)  # another process may have been faster
                for part in sorted(staging.iterdir(), key=lambda path: path.name == last):
                    _rename(part, out / part.name, out)
                sync_folder(out)
        else:
            _rename(staging, out, out)  # refused by the system if another process was faster
            sync_folder(out.parent)
    except FailedWrite as error:  # said of what was asked for, not of a folder that is gone
        where = (error.where or "").replace(str(staging), str(out))
        raise FailedWrite(error.problem, where=where, found=error.found, fix=error.fix) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _rename(old: Path, new: Path, out: Path) -> None:
    try:
        old.rename(new)
    except OSError as error:
        raise cannot_write(out, error) from None
