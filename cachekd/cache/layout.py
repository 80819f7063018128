"""Where everything stands in a cache's folder, and what to say of a folder that holds none."""

from __future__ import annotations

import re
from pathlib import Path

from cachekd.errors import CachekdError
from cachekd.paths import MANIFEST_FILE, address_of, what_is_there

SHARD_FOLDER = "shards"
SKETCH_FILE = "sketch.zarr.zip"
VOCABULARY_FILE = "vocabulary.zarr.zip"
SKIPPED_FILE = "skipped.jsonl"
DUMP_FOLDER = "dump"  # the plan, and a file for each finished shard
PLAN_FILE = f"{DUMP_FOLDER}/plan.json"
FINISHED_NAME = re.compile(r"[0-9]{5,9}")


def shard_name(number: int) -> str:
    """The name of shard `number`'s file, under shards/."""
    return f"{number:05d}.zarr.zip"


def require_manifest(folder: Path) -> Path:
    """Find the manifest of a cache.

    Raises:
        CachekdError: there is none.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise _not_a_cache(folder)
    return path


def _not_a_cache(folder: Path) -> CachekdError:
    if (folder / PLAN_FILE).is_file():
        return CachekdError(
            "this dump did not finish",
            where=str(folder),
            expected=MANIFEST_FILE,
            fix="run the same `cachekd dump` again, it goes on where it stopped (see `cachekd status`)",
        )
    if (address := address_of(folder)) is not None:
        return CachekdError(
            "this needs a cache on this disk, not an address",
            where=address,
            fix=f"`cachekd pull {address} FOLDER`, then the same with that folder",
        )
    if folder.is_dir():
        found, near = ", ".join(sorted(p.name for p in folder.iterdir())[:5]), None
    else:
        found, near = ("a file", None) if folder.exists() else what_is_there(folder)
    return CachekdError(
        "this is not a cache",
        where=str(folder),
        expected=MANIFEST_FILE,
        found=found,
        fix=near or "run `cachekd dump`, or fetch a published one with `cachekd pull`",
    )
