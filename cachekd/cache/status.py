"""How far a dump is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cachekd.cache.build import CacheBuild
from cachekd.cache.layout import PLAN_FILE
from cachekd.cache.manifest import Manifest
from cachekd.cache.plan import DumpPlan, read_plan
from cachekd.errors import CachekdError
from cachekd.paths import MANIFEST_FILE


@dataclass(frozen=True)
class Status:
    """How far a dump is; of a finished cache, all of it.

    Attributes:
        finished: whether it is a cache; the manifest comes last.
        shards, all_shards: finished ones, and how many there will be.
        samples, all_samples: in finished shards, and in the data set.
        skipped: samples that were left out so far.
        tokens: answer tokens so far.
        bytes: of the shards so far.
    """

    finished: bool
    shards: int
    all_shards: int
    samples: int
    all_samples: int
    skipped: int
    tokens: int
    bytes: int
    teacher: str
    data: str


def dump_status(path: str | Path) -> Status:
    """Look at a folder.

    Raises:
        CachekdError: it holds neither a dump nor a cache, or samples are added one by one to what is not
            finished: nobody knows how many are to come.
    """
    path = Path(path)
    if (path / MANIFEST_FILE).exists() or not (path / PLAN_FILE).exists():
        return _of_cache(Manifest.load(path))
    plan = read_plan(path / PLAN_FILE)
    if not isinstance(plan, DumpPlan):
        raise CachekdError(
            "samples are being added to this cache one by one, or were until the program died",
            where=str(path),
            expected="a finished cache, or a `cachekd dump` under way",
            fix="wait for the program that writes it; if it has died, remove the folder",
        )
    build = CacheBuild(path, plan)
    # Look at what is there, not at all that might be.
    found = [build.finished(number) for number in build.noted_numbers() if number < plan.shards]
    notes = [note for note in found if note is not None]
    shards = [note.shard for note in notes if note.shard is not None]
    return Status(
        finished=False,
        shards=len(notes),
        all_shards=plan.shards,
        samples=sum(shard.samples for shard in shards),
        all_samples=plan.source.data.samples,
        skipped=sum(len(note.skipped) for note in notes),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        teacher=plan.teacher.name,
        data=plan.source.data.path,
    )


def _of_cache(manifest: Manifest) -> Status:
    return Status(
        finished=True,
        shards=len(manifest.shards),
        all_shards=len(manifest.shards),
        samples=manifest.samples,
        all_samples=sum(source.data.samples for source in manifest.sources),
        skipped=manifest.skipped.samples if manifest.skipped else 0,
        tokens=manifest.tokens,
        bytes=manifest.size,
        teacher=manifest.teacher.name,
        data=", ".join(source.data.path for source in manifest.sources),
    )
