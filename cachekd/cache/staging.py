"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachekd.cache.files import cannot_write, make_folder, refuse_address, sync_folder
from cachekd.errors import CachekdError


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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CachekdError(
            f"the folder for the {what} already holds something",
            where=str(out),
            expected="a new or empty folder: nothing is ever overwritten",
            fix="choose another folder",
        )
    staging = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)  # of a process that had the same number and was killed
    make_folder(staging)
    try:
        yield staging
        try:
            sync_folder(staging)
            if out.exists():  # stays: it may be a mount, or where someone stands
                for part in sorted(staging.iterdir(), key=lambda path: path.name == last):
                    part.rename(out / part.name)
                sync_folder(out)
            else:
                staging.rename(out)
                sync_folder(out.parent)
        except OSError as error:
            raise cannot_write(out, error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
