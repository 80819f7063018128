"""What a dump or a derivation set out to do, what of it is finished, and what was skipped."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import FailFast, Field

from cachekd.atomic import commit, read_plain
from cachekd.cache.layout import SKIPPED_FILE
from cachekd.cache.manifest import Header, ShardInfo, SkippedInfo
from cachekd.cache.sealed import RESTORE, Part, Sealed, read_json
from cachekd.cache.source import Geometry, Source
from cachekd.errors import CachekdError

MOST_SKIPPED = 2**28  # bytes
MOST_LINES = 2**21  # samples


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
    """The plan of a dump. Its shards are known beforehand, so that it can be resumed."""

    source: DumpSource

    @property
    def shards(self) -> int:
        """How many there will be."""
        return -(-self.source.data.samples // self.source.geometry.shard_samples)

    def spans(self) -> list[tuple[int, int]]:
        """Give first and last + 1 sample of the data set for each shard."""
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


class FinishedShard(Sealed):
    """dump/00000.json: a shard is finished once this is there."""

    plan_sha256: str
    shard: ShardInfo | None = Field(description="null where every sample was left out")
    skipped: Annotated[list[Skipped], FailFast()]


class SkippedSamples:
    """What is in the file, line by line: all in memory at once take some 700 bytes each."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._lines = content.count(b"\n")

    def __len__(self) -> int:
        return self._lines

    def __iter__(self) -> Iterator[Skipped]:
        # Not splitlines: a key may hold U+2028, which JSON leaves as it is.
        return (Skipped.model_validate_json(line, strict=True) for line in io.BytesIO(self._content))


def pack_skipped(skipped: Iterable[Skipped]) -> bytes:
    """Write the file's bytes, a line of JSON per sample."""
    content = io.BytesIO()
    content.writelines(f"{json.dumps(dict(sample), ensure_ascii=False)}\n".encode() for sample in skipped)
    return content.getvalue()


def skipped_info(skipped: list[Skipped] | SkippedSamples) -> SkippedInfo | None:
    """What the manifest says of the file; None where there is none."""
    if not skipped:
        return None
    content = pack_skipped(skipped)
    return SkippedInfo(samples=len(skipped), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_skipped(path: Path, skipped: list[Skipped] | SkippedSamples) -> None:
    """Write it into a cache's folder, if there is anything in it that is not there yet."""
    file, content = path / SKIPPED_FILE, pack_skipped(skipped)
    if skipped and not (file.exists() and file.read_bytes() == content):
        commit(file, content)


def read_skipped(path: Path, info: SkippedInfo | None) -> SkippedSamples:
    """The samples that were left out.

    Args:
        path: the cache.
        info: what its manifest says; None where no sample was left out.

    Raises:
        CachekdError: the file is missing, or is not the one that was written.
    """
    if info is None:
        return SkippedSamples(b"")
    try:
        content = read_plain(path / SKIPPED_FILE, min(info.bytes, MOST_SKIPPED))
    except OSError as error:
        raise _not_it(path, error.strerror or str(error)) from None
    found = hashlib.sha256(content).hexdigest()
    if found != info.sha256:
        raise _not_it(path, f"sha256 {found}, expected {info.sha256}")
    expected = f"expected {info.samples:,} in {info.bytes:,}"
    skipped = SkippedSamples(content)
    counts = (len(skipped), len(content))
    if counts != (info.samples, info.bytes) or len(skipped) > MOST_LINES or content[-1:] != b"\n":
        raise _not_it(path, f"{len(skipped):,} samples in {len(content):,} bytes, {expected}")
    try:
        for _ in skipped:
            pass
    except ValueError as error:
        raise _not_it(path, str(error)) from None
    return skipped


def _not_it(path: Path, found: str) -> CachekdError:
    return CachekdError(
        f"{SKIPPED_FILE} is not what was written",
        where=str(path / SKIPPED_FILE),
        found=found,
        fix=RESTORE,
    )
