"""The exceptions that users are meant to see; what a failed write says."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

E = TypeVar("E", bound=Exception)

_MOST = 200  # characters of a sample's data in one field of a message
_MEMORY_ADDRESS = re.compile(r"(?: at 0x[0-9a-fA-F]+)+(?=>)")  # another in every run


class CachekdError(Exception):
    """Bad input or a stale cache: what is wrong, where, expected against found, and what to do next.

    The CLI prints it without a traceback and exits with code 2.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        problem, where, expected, found = map(self._told, (problem, where, expected, found))
        self.problem, self.where, self.expected, self.found, self.fix = problem, where, expected, found, fix
        lines = [problem]
        for label, value in (("where", where), ("expected", expected), ("found", found), ("try", fix)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))

    @staticmethod
    def _told(value: Any) -> Any:
        """Say a field as it is; a sample's error says less."""
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the fields: worker processes send these, and Exception's own way knows the text only."""
        rebuild = partial(
            type(self), where=self.where, expected=self.expected, found=self.found, fix=self.fix
        )
        return rebuild, (self.problem,)


def megabytes(size: int) -> str:
    """Say bytes in a message."""
    return f"{size / 1e6:,.1f} MB"


def within(place: str, error: CachekdError, then: str | None = None) -> CachekdError:
    """Return an error that also says what it is a part of, and what else to do about it."""
    return CachekdError(
        error.problem,
        where=place if error.where is None else f"{place}: {error.where}",
        expected=error.expected,
        found=error.found,
        fix="; ".join(text for text in (error.fix, then) if text) or None,
    )


@contextmanager
def about(name: str, then: str | None = None, *, what: str = "setting") -> Iterator[None]:
    """Have errors in the block name this setting, or what else it is.

    Args:
        then: what else to do about them.
    """
    try:
        yield
    except CachekdError as error:
        raise within(f"{what} {name!r}", error, then) from error


class FailedWrite(CachekdError):
    """A file could not be written: the disk is full or read-only, or nothing may be written there."""


class BadSample(CachekdError):
    """One sample cannot be used, the rest of its data set can; `--on-error skip` leaves it out.

    What it says may quote the data: each field but `fix` is cut to 200 characters, and loses addresses in
    memory (`<Image at 0x7f...>`), so that equal dumps leave equal reasons.
    """

    @staticmethod
    def _told(value: Any) -> Any:
        """Shorten a text that is too long or holds an address. Pickling repeats this and changes nothing."""
        if value is None:
            return None
        text = str(value)
        told = clipped(_MEMORY_ADDRESS.sub("", text))
        return value if told == text else told


class LeftOut(BadSample):
    """A sample that the settings leave out, whatever `--on-error` says."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Find the known name that was probably meant; None if none is like it."""
    near = get_close_matches(name, list(known), 1)
    return near[0] if near else None


def did_you_mean(meant: object | None) -> str | None:
    """Advise what was probably meant; None if there is nothing."""
    return None if meant is None else f"did you mean {meant}?"


def some_of(names: Sequence[str], most: int = 8) -> str:
    """Write the first of many names, and how many there are beside.

    >>> some_of(["ce", "align", "vsd"], 2)
    'ce, align, and 1 more'
    """
    rest = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*names[:most], *rest])


def missing_package(where: str, error: ImportError) -> CachekdError:
    """What to tell where fsspec lacks the package for a kind of address; it says itself which to install."""
    said = str(error)
    return CachekdError("a package is missing that reads such addresses", where=where, found=said, fix=said)


def first_line(error: BaseException) -> str:
    """What another library's error says, in a line; of one without a text, what it is."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def without_frames(error: E) -> E:
    """Strip the frames from an error that is kept as a value: they hold images and tensors, and cannot be
    pickled."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def clipped(text: str, most: int = _MOST) -> str:
    """Cut a text to `most` characters: of a longer one both ends stay."""
    if len(text) <= most:
        return text
    head = (most - 5) // 2
    return f"{text[:head]} ... {text[len(text) - (most - 5 - head) :]}"


_FIXES = {
    errno.ENOSPC: "free some space, then run the same command again: what is finished stays",
    errno.EDQUOT: "free some of your quota, then run the same command again: what is finished stays",
    errno.EROFS: "choose an --out on a file system that can be written",
    errno.EISDIR: "name the file, as in FOLDER/name",
    errno.ENOTDIR: "choose another folder",
    errno.ENOENT: "choose an --out where files can be made",
    errno.EACCES: "choose an --out that you may write to, or change its permissions",
}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
# What safetensors and tokenizers say of a failed write, whose errors are no OSErrors; the others are torch's.
_NO_WRITE = ("(os error ", "iostream error", "inline_container", "PytorchStreamWriter")


def cannot_write(path: Path, error: OSError) -> FailedWrite:
    """What to tell the user of a failed write."""
    return FailedWrite(
        "a file cannot be written",
        where=str(path),
        found=error.strerror or str(error),
        fix=_FIXES.get(error.errno or 0, "mend what the system says, then run the same command again"),
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say a failed write of whatever library as our own.

    Raises:
        FailedWrite: `path` could not be written.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CachekdError) or not is_failed_write(error):
            raise
        failed = error if isinstance(error, OSError) else OSError(0, what_failed(error))
        raise cannot_write(path, failed) from error


def is_failed_write(error: Exception) -> bool:
    """Whether a file could not be written, whoever wrote it; in a block that does nothing but write."""
    return isinstance(error, (OSError, FailedWrite)) or any(said in str(error) for said in _NO_WRITE)


def is_full_disk(error: BaseException) -> bool:
    """Whether it can be nothing but a disk that is full or read-only, in whatever block it came up."""
    return isinstance(error, OSError) and error.errno in _FULL


def what_failed(error: BaseException) -> str:
    """Say it in a line, for the message of a larger failure."""
    if isinstance(error, FailedWrite):
        return f"{error.where}: {error.found}"
    return f"{type(error).__name__}: {first_line(error)}"
