"""Is a cache what was written? Every file against its checksum, and all of them against each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cachekd.cache.build import RECORD_FOLDER, SHARD_FOLDER, SKIPPED_FILE
from cachekd.cache.manifest import MANIFEST_FILE, PLAN_FILE, Manifest, Plan, ShardRecord
from cachekd.cache.sealed import is_canonical
from cachekd.cache.shard import read_keys
from cachekd.errors import CachekdError


@dataclass(frozen=True)
class Finding:
    """Something is wrong with a file.

    Attributes:
        shard: its number in the manifest, if it is a shard: making it again mends it.
    """

    path: Path
    problem: str
    shard: int | None = None


def verify_files(path: Path, progress: Callable[[int], None] = lambda done: None) -> list[Finding]:
    """Compare a cache with its manifest.

    Args:
        path: the cache.
        progress: is told the bytes that were read since the last call.

    Raises:
        CachekdError: there is no manifest, or it is damaged: then nothing can be said of the rest.
    """
    manifest = Manifest.load(path)
    findings = []
    if not is_canonical(path / MANIFEST_FILE):
        findings.append(Finding(path / MANIFEST_FILE, "was changed after it was written"))
    findings += _sealed_files(path, manifest)
    files = [(path / sketch.name, sketch.sha256, None) for sketch in manifest.sketches]
    if manifest.skipped is not None:
        files.append((path / SKIPPED_FILE, manifest.skipped.sha256, None))
    for file, sha256, _ in files:
        if problem := _problem(file, sha256, progress):
            findings.append(Finding(file, problem))
    places: dict[str, str] = {}
    for number, info in enumerate(manifest.shards):
        file = path / SHARD_FOLDER / info.name
        problem = _problem(file, info.sha256, progress)
        if problem:
            findings.append(Finding(file, problem, number))
            continue
        keys = read_keys(file)
        if len(keys) != info.samples:
            findings.append(
                Finding(file, f"has {len(keys)} samples, the manifest says {info.samples}", number)
            )
        for key in keys:
            if key in places:
                findings.append(Finding(file, f"the key {key!r} is in {places[key]} as well"))
            places[key] = info.name
    return findings


def strays(path: Path) -> list[Path]:
    """Files in a cache's folders that the manifest does not know: harmless, but no part of it."""
    manifest = Manifest.load(path)
    known = {info.name for info in manifest.shards}
    return [file for file in sorted((path / SHARD_FOLDER).iterdir()) if file.name not in known]


def _sealed_files(path: Path, manifest: Manifest) -> Iterator[Finding]:
    """The plan and the records, where a cache still has them."""
    plan_file = path / PLAN_FILE
    if plan_file.exists():
        try:
            plan = Plan.read(plan_file)
            if not is_canonical(plan_file):
                yield Finding(plan_file, "was changed after it was written")
            elif plan.source not in manifest.sources:
                yield Finding(plan_file, "is the plan of another dump")
        except CachekdError as error:
            yield Finding(plan_file, error.problem)
    listed = {(info.name, info.sha256) for info in manifest.shards}
    for file in sorted((path / RECORD_FOLDER).glob("[0-9]*.json")):
        try:
            record = ShardRecord.read(file)
            if not is_canonical(file):
                yield Finding(file, "was changed after it was written")
            elif record.shard is not None and (record.shard.name, record.shard.sha256) not in listed:
                yield Finding(file, "is the record of a shard that the manifest does not list")
        except CachekdError as error:
            yield Finding(file, error.problem)


def _problem(file: Path, sha256: str, progress: Callable[[int], None]) -> str | None:
    try:
        with file.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
                progress(len(block))
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if digest.hexdigest() != sha256:
        return f"differs from what was written: sha256 {digest.hexdigest()}, expected {sha256}"
    return None
