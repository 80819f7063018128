"""Files that are whole on the disk or not there."""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cachekd.errors import CachekdError, cannot_write
from cachekd.paths import address_of

_DAY = 86_400.0


def commit(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to the disk, then rename: a crash leaves the old file or none.

    Raises:
        CachekdError: the disk is full, or the folder cannot be written.
    """
    with _beside(path, content) as temporary:
        temporary.replace(path)


def commit_first(path: Path, content: bytes) -> bool:
    """Like `commit`, but the first one wins, of whatever process on whatever machine.

    It takes a file system with hard links. On one without them, two processes that write within the same
    moment may both believe to be the first: there, let one begin alone.

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


def write_file(path: Path, content: bytes) -> None:
    """Do as `commit` does, in a folder that is made where there is none.

    Raises:
        CachekdError: it cannot be written.
    """
    require_place(path)
    make_folder(path.parent)
    commit(path, content)


@contextmanager
def _beside(path: Path, content: bytes) -> Iterator[Path]:
    """The content on the disk under a temporary name, for as long as the block runs."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("xb") as stream:
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


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)


def read_plain(path: Path, most: int | None = None) -> bytes:
    """A file's bytes. Links are followed: a hub's snapshots are made of them.

    Args:
        most: bytes that it may have.

    Raises:
        OSError: it cannot be read, is a device, pipe or folder, or is larger.
    """
    size = require_plain(path)
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"{size:,} bytes, expected {most:,} at most")
    with path.open("rb") as stream:
        content = stream.read(size + 1)
    if len(content) != size:
        raise OSError(errno.EIO, "the file changed while it was read")
    return content


def require_plain(path: Path) -> int:
    """The size of a file; a pipe would be waited for, and some devices never end.

    Raises:
        OSError: it is missing, or no plain file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a plain file")
    return status.st_size


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        CachekdError: it cannot be made, is a file, or an address.
    """
    refuse_address(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def refuse_address(path: Path) -> None:
    """Refuse an address where a path is meant, before it becomes a folder `s3:`.

    Raises:
        CachekdError: it is an address.
    """
    if (address := address_of(path)) is not None:
        raise CachekdError(
            "this is an address, and what is made here needs a folder on this disk",
            where=address,
            fix=f"choose a folder; `cachekd push FOLDER {address}` takes a cache there",
        )


def require_place(path: Path) -> None:
    """Refuse at once a file that cannot be written, not after minutes of work; `write_file` makes its folder.

    Raises:
        CachekdError: it is a folder, device or address, or nothing can be made where it would be.
    """
    if path.exists() and not path.is_file():  # a device would become a file
        raise cannot_write(path, OSError(errno.EISDIR, "a folder" if path.is_dir() else "not a plain file"))
    require_room_for(path)


def require_room_for(path: Path) -> None:
    """Refuse at once a folder that cannot be made.

    Raises:
        CachekdError: it is an address, or nothing can be made where it would be.
    """
    refuse_address(path)
    places = [path.absolute(), *path.absolute().parents]
    there = next(place for place in places[path.is_file() :] if place.exists())
    if not there.is_dir():
        raise cannot_write(path, NotADirectoryError(errno.ENOTDIR, f"{there} is no folder"))
    try:  # permissions alone do not tell: of /proc, of some network file systems, of a full disk
        os.rmdir(tempfile.mkdtemp(prefix=".cachekd-", dir=there))
    except OSError as error:
        raise cannot_write(path, OSError(error.errno, f"{error.strerror}: {there}")) from None


def free_space(path: Path) -> tuple[Path, int]:
    """Bytes that are free where a file or folder is or will be, and the nearest place there that exists."""
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    return place, shutil.disk_usage(place).free


def temporary_name(name: str) -> str:
    """What a file is called while this process writes it: no other one, of whatever machine, calls it so."""
    return f".{name}.tmp-{_HERE}-{os.getpid()}-{secrets.token_hex(4)}"


def is_temporary(path: Path) -> bool:
    """Whether it is a file that is being written, or was when its process died."""
    return path.name.startswith(".") and ".tmp-" in path.name


def is_stale(name: str, modified: float) -> bool:
    """Whether the process that wrote a temporary file is gone; of another machine's: whether it is a day old.

    Args:
        modified: when it was, in seconds since 1970.
    """
    where, process, _ = [*name.rpartition(".tmp-")[2].rsplit("-", 2), "", ""][:3]
    if where == _HERE and process.isdigit():
        return not _alive(int(process))
    return time.time() - modified > _DAY


def remove_stale(folder: Path, of: str = "") -> None:
    """Remove what dead processes left under a `temporary_name`; of other machines', what is a day old.

    Args:
        of: the name that it stood for; by default any.
    """
    for path in folder.glob(f".{glob.escape(of) or '*'}.tmp-*"):
        with suppress(FileNotFoundError):
            if not is_stale(path.name, path.stat().st_mtime):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _here() -> str:
    """This machine, and where process numbers count: containers may share a name, but not that."""
    try:
        numbers = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:  # no Linux
        numbers = "0"
    return re.sub(r"[^A-Za-z0-9.]", "_", f"{socket.gethostname()}.{numbers}")


_HERE = _here()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # alive, and someone else's
    return True
