"""dump/: what a dump set out to do, and which of its shards are finished."""

from __future__ import annotations

from typing import Annotated

from pydantic import FailFast, Field

from cachekd.cache.manifest import Header, ShardInfo, Source
from cachekd.cache.sealed import Part, Sealed


class Plan(Header):
    """dump/plan.json: what a dump set out to do, written first, by whichever process was first."""

    source: Source

    @classmethod
    def under(cls, header: Header, source: Source) -> Plan:
        """The plan of a dump whose logits have the header of a manifest, say."""
        common = {name: getattr(header, name) for name in Header.model_fields if name != "sha256"}
        return cls(**common, source=source)

    @property
    def shards(self) -> int | None:
        """How many there will be; None where samples are added one by one."""
        geometry = self.source.geometry
        return None if geometry is None else -(-self.source.data.samples // geometry.shard_samples)

    def spans(self) -> list[tuple[int, int]]:
        """Of each shard, first and last + 1 sample of the data set.

        Raises:
            ValueError: samples were added one by one.
        """
        if self.source.geometry is None:
            raise ValueError("this plan has no geometry")
        count, size = self.source.data.samples, self.source.geometry.shard_samples
        return [(start, min(start + size, count)) for start in range(0, count, size)]


class Skipped(Part):
    """A sample that was left out."""

    key: str
    reason: str


class ShardRecord(Sealed):
    """dump/00000.json: a shard is finished once this is there."""

    plan_sha256: str
    shard: ShardInfo | None = Field(description="null where every sample was left out")
    skipped: Annotated[list[Skipped], FailFast()]
