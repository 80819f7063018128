"""Write again what of a cache follows from its other files: no teacher, no data."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cachekd.cache.build import RECORD_FOLDER, SHARD_FOLDER, CacheBuild
from cachekd.cache.dump_folder import wrong_files
from cachekd.cache.files import commit
from cachekd.cache.manifest import MANIFEST_FILE, PLAN_FILE, Manifest
from cachekd.cache.plan import Plan, ShardRecord
from cachekd.cache.sealed import is_canonical
from cachekd.cache.skipped import SKIPPED_FILE, SkippedSamples, pack_skipped, read_skipped
from cachekd.errors import CachekdError


def restore_manifest(path: Path) -> Manifest:
    """Write a damaged manifest again from the plan and the records of the dump, if they are still there.

    Raises:
        CachekdError: they are not, or are damaged as well.
    """
    try:
        build = CacheBuild(path, Plan.read(path / PLAN_FILE))
        return build.write_manifest(_all_records(build))
    except CachekdError as error:
        raise CachekdError(
            "the manifest cannot be written again",
            where=str(path / MANIFEST_FILE),
            expected=f"the dump's plan and records in {path / RECORD_FOLDER}",
            found=error.problem + (f" ({error.where})" if error.where else ""),
            fix="restore it from where the cache came from, or dump again",
        ) from None


def _all_records(build: CacheBuild) -> dict[int, ShardRecord]:
    """The records of all shards, by number.

    Raises:
        CachekdError: one is missing or damaged, so that a manifest would leave its shard out.
    """
    numbers = build.record_numbers()
    count = build.plan.shards
    if count is None:  # added one by one: the last record may be lost, but hardly with its shard
        shards = (build.path / SHARD_FOLDER).glob("[0-9]*.zarr.zip")
        files = [int(file.name.split(".")[0]) for file in shards]
        count = 1 + max([*numbers, *files], default=-1)
    records = {number: build.noted(number) for number in numbers}
    sound = {number: record for number, record in records.items() if record is not None}
    if len(sound) != count or max(sound, default=-1) + 1 != count:
        raise CachekdError(f"{len(sound):,} of {count:,} shards have a sound record")
    return sound


def tidy(path: Path) -> list[str]:
    """Mend what needs no teacher: a reformatted manifest, skipped.jsonl, and the plan and records of dump/.

    Returns:
        what was done, a line each.

    Raises:
        CachekdError: something is broken, and what it would be made from is broken too.
    """
    done = []
    manifest = Manifest.load(path)
    if not is_canonical(path / MANIFEST_FILE):
        commit(path / MANIFEST_FILE, manifest.to_json())
        done.append(f"{MANIFEST_FILE}: written again")
    try:
        skipped = read_skipped(path, manifest.skipped)
    except CachekdError as error:
        skipped = _restore_skipped(path, manifest, error)
        done.append(f"{SKIPPED_FILE}: written again from the dump's records")
    return done + _mend_dump_folder(path, manifest, skipped)


def _mend_dump_folder(path: Path, manifest: Manifest, skipped: SkippedSamples) -> list[str]:
    done = []
    for file, problem, expected in wrong_files(path, manifest, skipped):
        if expected is None:
            raise CachekdError(
                f"{file.name} does not belong to this cache",
                where=str(file),
                found=problem,
                fix=f"remove {file.parent}: a finished cache does not need it",
            )
        commit(file, expected.to_json())
        done.append(f"{file.parent.name}/{file.name}: written again from the manifest")
    return done


def _restore_skipped(path: Path, manifest: Manifest, error: CachekdError) -> SkippedSamples:
    """skipped.jsonl, from the records; `error` says what was wrong with it."""
    try:
        build = CacheBuild(path, Plan.read(path / PLAN_FILE))
        records = [build.noted(number) for number in build.record_numbers()]
        content = pack_skipped([sample for record in records if record for sample in record.skipped])
    except CachekdError:
        raise error from None
    if manifest.skipped is None or hashlib.sha256(content).hexdigest() != manifest.skipped.sha256:
        raise CachekdError(
            f"{SKIPPED_FILE} cannot be written again",
            where=str(path / SKIPPED_FILE),
            expected="the dump's records, all of them",
            found=error.found,
            fix="fetch it from where the cache came from",
        )
    commit(path / SKIPPED_FILE, content)
    return read_skipped(path, manifest.skipped)
