"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachekd.cache.files import (
    cannot_write,
    make_folder,
    refuse_address,
    remove_stale,
    require_new_folder,
    sync_folder,
    temporary_name,
)
from cachekd.cache.lock import alone
from cachekd.errors import FailedWrite


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
