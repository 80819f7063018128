"""dump/ of a finished cache: all that its plan and records say follows from manifest.json and skipped.jsonl.

So each can be checked against the other, and written again from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cachekd.cache.build import RECORD_FOLDER, RECORD_NAME
from cachekd.cache.manifest import PLAN_FILE, Manifest
from cachekd.cache.plan import Plan, ShardRecord, Skipped
from cachekd.cache.sealed import Sealed, is_canonical
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


def records_of(manifest: Manifest, plan: Plan, skipped: list[Skipped]) -> dict[int, ShardRecord] | None:
    """The records of the dump that wrote a manifest, by number of the shard.

    Args:
        skipped: what skipped.jsonl says.

    Returns:
        None where the manifest is not that of a whole dump.
    """
    shards = {int(info.name.partition(".")[0]): info for info in manifest.shards}
    count = len(shards) if plan.shards is None else plan.shards
    if not count - len(shards) <= len(skipped) or any(number >= count for number in shards):
        return None
    spans = plan.spans() if plan.source.geometry else []
    records, left = {}, list(skipped)
    for number in range(count):
        info = shards.get(number)
        # A sample of the span is in the shard, or was left out.
        out = spans[number][1] - spans[number][0] - (info.samples if info else 0) if spans else 0
        here, left = left[: max(0, out)], left[max(0, out) :]
        records[number] = ShardRecord(plan_sha256=str(plan.sha256), shard=info, skipped=here)
    return None if left else records


def wrong_files(path: Path, manifest: Manifest, skipped: list[Skipped] | None) -> Iterator[Wrong]:
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
    expected = {folder / f"{number:05d}.json": record for number, record in (records or {}).items()}
    for file in sorted(there | set(expected)):
        record = expected.get(file)
        if problem := _problem(file, record, compare=records is not None):
            yield Wrong(file, problem, record)


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
