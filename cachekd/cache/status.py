"""How far a dump is, from what is on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cachekd.cache.build import CacheBuild
from cachekd.cache.manifest import MANIFEST_FILE, PLAN_FILE, Manifest, Plan


@dataclass(frozen=True)
class Status:
    """Of a dump under way, or of a finished cache.

    Attributes:
        shards, all_shards: finished ones, and how many there will be.
        samples, all_samples: in finished shards, and in the data set.
        skipped: samples that were left out so far.
        tokens: answer tokens so far.
        bytes: of the shards so far.
    """

    shards: int
    all_shards: int
    samples: int
    all_samples: int
    skipped: int
    tokens: int
    bytes: int
    teacher: str
    data: str

    @property
    def finished(self) -> bool:
        return self.shards == self.all_shards


def dump_status(path: Path) -> Status:
    """Look at a folder.

    Raises:
        CachekdError: it holds neither a dump nor a cache.
    """
    if (path / MANIFEST_FILE).exists() or not (path / PLAN_FILE).exists():
        manifest = Manifest.load(path)
        return Status(
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
    plan = Plan.read(path / PLAN_FILE)
    spans = plan.spans()
    records = CacheBuild(path, plan).records(len(spans))
    shards = [record.shard for record in records.values() if record.shard is not None]
    return Status(
        shards=len(records),
        all_shards=len(spans),
        samples=sum(shard.samples for shard in shards),
        all_samples=plan.source.data.samples,
        skipped=sum(len(record.skipped) for record in records.values()),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        teacher=plan.teacher.name,
        data=plan.source.data.path,
    )
