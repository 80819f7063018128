"""dump/ of a finished cache, file by file: all that it says follows from manifest.json and skipped.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from cachekd.atomic import read_plain
from cachekd.cache.build import RECORD_FOLDER, RECORD_NAME
from cachekd.cache.manifest import PLAN_FILE, Manifest, shard_name
from cachekd.cache.plan import DumpPlan, ShardRecord, plan_under
from cachekd.cache.sealed import MOST_JSON
from cachekd.cache.skipped import SkippedSamples


def dump_files(manifest: Manifest, skipped: SkippedSamples) -> Iterator[tuple[str, bytes]]:
    """Names in the cache's folder and contents of the plan and the records that make this manifest.

    Nothing of a cache that was made of others, and no records where the manifest is not of a whole dump.

    Args:
        skipped: what skipped.jsonl says.
    """
    if manifest.lineage or len(manifest.sources) > 1:
        return
    plan = plan_under(manifest, manifest.sources[0])
    content = plan.to_json()
    yield PLAN_FILE, content
    listed = {info.name: info for info in manifest.shards}
    sizes = [0] * len(listed)
    if isinstance(plan, DumpPlan):
        if plan.shards - len(listed) > len(skipped):  # of a shard that is not there something was left out
            return
        sizes = [last - first for first, last in plan.spans()]
    sha256, left = json.loads(content)["sha256"], iter(skipped)
    for number, size in enumerate(sizes):
        info = listed.get(shard_name(number))
        here = list(islice(left, max(0, size - info.samples if info else size)))
        record = ShardRecord(plan_sha256=sha256, shard=info, skipped=here)
        yield f"{RECORD_FOLDER}/{number:05d}.json", record.to_json()


def files_there(path: Path) -> set[Path]:
    """The plan and the records that a cache's folder has."""
    files = (path / RECORD_FOLDER).glob("*.json")
    return {file for file in files if RECORD_NAME.fullmatch(file.stem) or file == path / PLAN_FILE}


def wrong_files(
    path: Path, manifest: Manifest, skipped: SkippedSamples
) -> Iterator[tuple[Path, str, bytes | None]]:
    """Compare dump/ with the manifest where a cache still has it: a finished one does not need it.

    Returns:
        file, what is wrong with it, and what should be in it; None where there should be no such file.
    """
    there = files_there(path)
    if not there:
        return
    for name, content in dump_files(manifest, skipped):
        there.discard(path / name)
        try:
            if read_plain(path / name, MOST_JSON) != content:
                yield path / name, "says something else than the manifest", content
        except FileNotFoundError:
            yield path / name, "is missing", content
        except OSError as error:
            yield path / name, f"cannot be read: {error.strerror}", content
    for file in sorted(there):
        yield file, "says something else than the manifest: it has no place there", None
