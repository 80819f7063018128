"""A run's checkpoints: the Trainer's, each whole or not one to go on from, with the settings of its run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cachekd.atomic import commit, is_failed_write, what_failed
from cachekd.errors import CachekdError

SETTINGS_FILE = "cachekd_settings.json"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole one in a folder; the Trainer writes its state last, so one without was cut short."""
    return max(filter(_is_whole, folder.glob("checkpoint-*")), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that are in a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def note_settings(settings: dict[str, Any], checkpoint: Path) -> None:
    """Write into a checkpoint what it is made with."""
    commit(checkpoint / SETTINGS_FILE, json.dumps(settings, indent=1).encode())


@contextmanager
def saving_checkpoint(checkpoint: Path) -> Iterator[None]:
    """If the block, which saves it, fails for the disk, remove what there is of it: it takes room.

    Raises:
        CachekdError: it could not be saved; what there is to go on from.
    """
    try:
        yield
    except Exception as error:
        if not is_failed_write(error):
            raise
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
        newest = newest_checkpoint(checkpoint.parent)
        then = "there is no earlier one, and the same command begins anew"
        if newest is not None:
            then = f"{newest.name} stays, and the same command goes on from step {step_of(newest):,}"
        raise CachekdError(
            "a checkpoint could not be saved: the disk is full, or cannot be written",
            where=str(checkpoint),
            found=what_failed(error),
            fix=f"free some space on this disk; {then}",
        ) from error


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False
