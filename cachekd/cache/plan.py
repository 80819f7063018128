"""What a dump or a derivation set out to do, what of it is finished, and what was skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import FailFast, Field

from cachekd.cache.manifest import Geometry, Header, ShardInfo, Source
from cachekd.cache.sealed import Part, Sealed, read_json


class Plan(Header):
    """dump/plan.json: what a dump set out to do, written first, by whichever process was first."""

    # Of a data set it is a `DumpPlan`; where samples are added one by one, their number is not known.
    source: Source

    @classmethod
    def under(cls, header: Header, source: Source) -> Self:
        """The plan of a dump whose logits have the header of a manifest, say."""
        common = {name: getattr(header, name) for name in Header.model_fields if name != "sha256"}
        return cls(**common, source=source.model_dump())


class DumpSource(Source):
    """A data set that is cut up."""

    geometry: Geometry


class DumpPlan(Plan):
    """Of a dump: its shards are known beforehand, so that it can be gone on with."""

    source: DumpSource

    @property
    def shards(self) -> int:
        """How many there will be."""
        return -(-self.source.data.samples // self.source.geometry.shard_samples)

    def spans(self) -> list[tuple[int, int]]:
        """Of each shard, first and last + 1 sample of the data set."""
        count, size = self.source.data.samples, self.source.geometry.shard_samples
        return [(start, min(start + size, count)) for start in range(0, count, size)]


def plan_under(header: Header, source: Source) -> Plan | DumpPlan:
    """The plan of whoever wrote a manifest with this header and this one source."""
    return (Plan if source.geometry is None else DumpPlan).under(header, source)


def read_plan(path: Path) -> Plan | DumpPlan:
    """dump/plan.json.

    Raises:
        CachekdError: it is missing, damaged, or of another form.
    """
    values = read_json(path)
    plan = Plan.parse(path, values)
    return plan if plan.source.geometry is None else DumpPlan.parse(path, values)


class Skipped(Part):
    """A sample that was left out."""

    key: str
    reason: str


class ShardRecord(Sealed):
    """dump/00000.json: a shard is finished once this is there."""

    plan_sha256: str
    shard: ShardInfo | None = Field(description="null where every sample was left out")
    skipped: Annotated[list[Skipped], FailFast()]
