"""Who works in a folder; and a folder that is there as a whole or not at all."""

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
    LEASE_FILE,
    LOCK_FILE,
    cannot_write,
    make_folder,
    refuse_address,
    remove_stale,
    require_new_folder,
    require_room_for,
    sync_folder,
    temporary_name,
)
from cachekd.errors import CachekdError, FailedWrite

_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # the last two are one on Linux
_LEASE, _GRACE = 60.0, 5.0  # seconds


@contextmanager
def alone(folder: Path, doing: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder for as long as the block runs. One that is made for it goes again if it stays empty.

    Args:
        doing: what another process does where it is refused, such as "trains in".
        patience: seconds to wait for another process.

    Raises:
        CachekdError: another process holds it: which, and since when; or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    note = folder / LOCK_FILE
    try:
        lock = _acquired(note, patience)
    except Timeout:
        if not note.exists():  # filelock waits as well where no file can be made, as in /proc
            require_room_for(folder)
        raise CachekdError(
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
