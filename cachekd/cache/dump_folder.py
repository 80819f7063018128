"""dump/ of a finished cache: all that its plan and records say follows from manifest.json and skipped.jsonl.

So each can be checked against the other, and written again from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cachekd.cache.build import RECORD_FOLDER, RECORD_NAME
from cachekd.cache.manifest import PLAN_FILE, Manifest, ShardInfo
from cachekd.cache.plan import Plan, ShardRecord, Skipped
from cachekd.cache.sealed import Sealed, is_canonical
from cachekd.cache.skipped import SkippedSamples
from cachekd.errors import CachekdError


class Wrong(NamedTuple):
    """A file of dump/ that is not what it should be.

    Attributes:
        expected: what should be there; None where the manifest does not say.
    """

    path: Path
    problem: str
    expected: Sealed | None


def plan_of(manifest: Manifest) -> Plan | None:
    """The plan of the dump that wrote a manifest; None for a merged cache, which has had several."""
    if len(manifest.sources) != 1:
        return None
    plan = Plan.under(manifest, manifest.sources[0])
    return Plan.model_validate_json(plan.to_json())  # with its seal, which the records name


def records_of(
    manifest: Manifest, plan: Plan, skipped: SkippedSamples
) -> Iterator[tuple[int, ShardRecord]] | None:
    """The records of the dump that wrote a manifest, one by one, with the shards' numbers.

    Args:
        skipped: what skipped.jsonl says.

    Returns:
        None where the manifest is not that of a whole dump.
    """
    shards = {int(info.name.partition(".")[0]): info for info in manifest.shards}
    count = len(shards) if plan.shards is None else plan.shards
    if not count - len(shards) <= len(skipped) or any(number >= count for number in shards):
        return None
    left_out = [0] * count
    if plan.source.geometry is not None:
        for number, (first, last) in enumerate(plan.spans()):
            # A sample of the span is in the shard, or was left out.
            there = shards[number].samples if number in shards else 0
            left_out[number] = max(0, last - first - there)
    if sum(left_out) < len(skipped):
        return None
    return _records(shards, str(plan.sha256), left_out, iter(skipped))


def _records(
    shards: dict[int, ShardInfo], plan_sha256: str, left_out: list[int], skipped: Iterator[Skipped]
) -> Iterator[tuple[int, ShardRecord]]:
    for number, count in enumerate(left_out):
        here = list(islice(skipped, count))
        yield number, ShardRecord(plan_sha256=plan_sha256, shard=shards.get(number), skipped=here)


def wrong_files(path: Path, manifest: Manifest, skipped: SkippedSamples | None) -> Iterator[Wrong]:
    """Compare dump/ with the manifest, where a cache still has it: a finished one does not need it.

    Args:
        skipped: what skipped.jsonl says; None if it is damaged.
    """
    folder = path / RECORD_FOLDER
    there = {file for file in folder.glob("*.json") if RECORD_NAME.fullmatch(file.stem)}
    plan_file = path / PLAN_FILE
    if not there and not plan_file.exists():
        return
    plan = plan_of(manifest)
    problem = _problem(plan_file, plan)
    if problem:
        yield Wrong(plan_file, problem, plan)
    elif plan is not None:
        plan = Plan.read(plan_file)  # one of another version may have another seal
    records = records_of(manifest, plan, skipped) if plan is not None and skipped is not None else None
    for number, record in records or ():
        file = folder / f"{number:05d}.json"
        there.discard(file)
        if problem := _problem(file, record):
            yield Wrong(file, problem, record)
    for file in sorted(there):
        if problem := _problem(file, None, compare=records is not None):
            yield Wrong(file, problem, None)


def _problem(file: Path, expected: Sealed | None, *, compare: bool = True) -> str | None:
    if not file.exists():
        return "is missing"
    try:
        kind = type(expected) if expected is not None else (Plan if file.name == "plan.json" else ShardRecord)
        found = kind.read(file)
        if not is_canonical(file):
            return "was changed after it was written"
    except CachekdError as error:
        return error.problem + (f": {error.found}" if error.found else "")
    unsealed = {"sha256": None}
    if compare and (
        expected is None or found.model_copy(update=unsealed) != expected.model_copy(update=unsealed)
    ):
        return "says something else than the manifest"
    return None
