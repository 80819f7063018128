"""Is a step's output whole? Cheap: names and sizes, as the manifest or the pipeline's record has them."""

from __future__ import annotations

import os
from pathlib import Path

from cachekd.cache.build import SHARD_FOLDER
from cachekd.cache.manifest import Manifest
from cachekd.cache.skipped import SKIPPED_FILE
from cachekd.errors import CachekdError
from cachekd.files import REPORT_FILE
from cachekd.pipeline.plan import PlannedStep

_LATER = {"train": {REPORT_FILE}}  # what `report` leaves in a run


def files_of(step: PlannedStep) -> dict[str, int]:
    """The files right in a step's folder and their bytes, for its record; none of a dump: it has a manifest.

    Not what is in folders: a finished run does without its checkpoints.
    """
    if step.kind == "dump":
        return {}
    return {
        path.name: path.stat().st_size
        for path in sorted(step.out.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name not in _LATER.get(step.kind, ())
    }


def damage_of(step: PlannedStep, recorded: dict[str, int]) -> str | None:
    """The first file of a finished step that is not as it was, and how; None where all are.

    Args:
        recorded: `files_of` when it was finished; empty in records from before there was such a list.
    """
    try:
        expected = _in_manifest(step.out) if step.kind == "dump" else recorded
    except CachekdError as error:
        return f"{error.where}: {error.problem}"
    for name, size in expected.items():
        try:
            found = os.stat(step.out / name).st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes, not {size:,}"
    return None


def _in_manifest(cache: Path) -> dict[str, int]:
    manifest = Manifest.load(cache)
    expected = {sketch.name: sketch.bytes for sketch in manifest.sketches}
    if manifest.skipped is not None:
        expected[SKIPPED_FILE] = manifest.skipped.bytes
    return expected | {f"{SHARD_FOLDER}/{shard.name}": shard.bytes for shard in manifest.shards}
