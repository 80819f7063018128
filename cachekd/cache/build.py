"""A cache in the making, of one process or many, and how far it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from cachekd.atomic import (
    commit,
    commit_first,
    contents,
    is_temporary,
    make_folder,
    remove_stale,
    require_new_folder,
    sync_folder,
)
from cachekd.cache.compare import facts, require_same
from cachekd.cache.manifest import (
    MANIFEST_FILE,
    PLAN_FILE,
    Fidelity,
    Manifest,
    ShardInfo,
    SketchInfo,
    shard_name,
)
from cachekd.cache.plan import DumpPlan, Plan, ShardRecord, read_plan, skipped_info, write_skipped
from cachekd.cache.tail.encoder import SketchEncoder, read_encoder, sketch_info
from cachekd.cache.tail.sketch import SKETCH_FILE
from cachekd.errors import CachekdError

SHARD_FOLDER = "shards"
RECORD_FOLDER = "dump"
RECORD_NAME = re.compile(r"[0-9]{5,9}")


def find_plan(path: Path) -> DumpPlan | None:
    """The plan of an earlier dump in this folder; None if the folder is new or empty.

    Raises:
        CachekdError: the folder holds something else, or its plan is damaged.
    """
    if not (path / PLAN_FILE).exists() and _is_empty(path):
        return None
    if (path / PLAN_FILE).exists():  # by now: another process may just have written it
        plan = read_plan(path / PLAN_FILE)
        if isinstance(plan, DumpPlan):
            return plan
    require_new_folder(path, "cache", ", or a dump to go on with")
    return None


def _is_empty(path: Path) -> bool:
    """But for our folders and temporary files, which a kill before the plan leaves."""
    if not path.is_dir():
        return False
    ours = (path / RECORD_FOLDER, path / SHARD_FOLDER)
    inside = [file for folder in ours if folder.is_dir() for file in folder.iterdir()]
    others = [file for file in contents(path) if file not in ours]
    return all(is_temporary(file) for file in (*inside, *others))


P = TypeVar("P", bound=Plan)


class CacheBuild(Generic[P]):
    """The folder of a cache that is being written, and the plan that holds there. See `start`."""

    def __init__(self, path: Path, plan: P) -> None:
        self.path, self.plan = path, plan

    @classmethod
    def start(cls, path: Path, plan: P) -> CacheBuild[P]:
        """Start a dump in a folder, or join one.

        Args:
            plan: what is to be done; if another process was faster, its plan holds.

        Raises:
            CachekdError: the folder cannot be written, or the plan that holds is for something else.
        """
        make_folder(path / RECORD_FOLDER)
        make_folder(path / SHARD_FOLDER)
        for folder in (path, path / RECORD_FOLDER, path / SHARD_FOLDER):
            remove_stale(folder)
        commit_first(path / PLAN_FILE, plan.to_json())
        found = type(plan).read(path / PLAN_FILE)
        where = "the dump in this folder"
        require_same(facts(found, found.source), facts(plan, plan.source), where, str(path))
        return cls(path, found)

    def encoder(self, fit: Callable[[], SketchEncoder] | None) -> SketchEncoder:
        """The tail sketch that all processes use: the one that is there, or a new one.

        Args:
            fit: makes one; None where one is there.

        Raises:
            CachekdError: it is gone, and shards were coded with it; or it is damaged.
        """
        path = self.path / SKETCH_FILE
        if not path.exists():
            if fit is None or self.record_numbers():
                raise CachekdError(
                    "the tail sketch is missing: fitted anew it would not fit the shards that are finished",
                    where=str(path),
                    fix="restore it, or dump into a new folder",
                )
            commit_first(path, fit().pack())
        return read_encoder(path)

    def sketch_info(self) -> SketchInfo | None:
        """What the manifest says of the tail sketch; None without one."""
        path = self.path / SKETCH_FILE
        if not path.exists():
            return None
        content, encoder = path.read_bytes(), read_encoder(path)
        return sketch_info(SKETCH_FILE, encoder, content)

    def shard_path(self, number: int) -> Path:
        """Where shard `number` is or will be."""
        return self.path / SHARD_FOLDER / shard_name(number)

    def finish_shard(self, number: int, record: ShardRecord) -> None:
        """Say that a shard is finished; its file is there."""
        commit(self._record_path(number), record.to_json())

    def remove_shard(self, number: int) -> None:
        """Take back that a shard is finished, then its file: whoever goes on makes it again."""
        for file in (self._record_path(number), self.shard_path(number)):
            file.unlink(missing_ok=True)
            sync_folder(file.parent)

    def record(self, number: int) -> ShardRecord | None:
        """Of a finished shard; None if it is still to be made (or made again: a damaged record is none)."""
        record = self.noted(number)
        shard = self.shard_path(number)
        if record and record.shard and not (shard.exists() and shard.stat().st_size == record.shard.bytes):
            return None
        return record

    def noted(self, number: int) -> ShardRecord | None:
        """The record of a shard, whatever has become of the shard itself; None without a sound one."""
        path = self._record_path(number)
        if not path.exists():
            return None
        try:
            record = ShardRecord.read(path)
        except CachekdError:
            return None
        return record if record.plan_sha256 == self.plan.sha256 else None

    def record_numbers(self) -> list[int]:
        """Of which shards there are records, sound or not."""
        names = (path.stem for path in (self.path / RECORD_FOLDER).glob("*.json"))
        return sorted(int(name) for name in names if RECORD_NAME.fullmatch(name))

    def records(self, count: int) -> dict[int, ShardRecord]:
        """Of the finished ones among shards 0 to count - 1."""
        found = {number: self.record(number) for number in range(count)}
        return {number: record for number, record in found.items() if record is not None}

    def assemble(self, count: int) -> Manifest:
        """Write the manifest of `count` finished shards.

        Raises:
            CachekdError: no shard has any sample.
        """
        records = self.records(count)
        if len(records) < count:
            raise ValueError(f"{count - len(records)} shards are not finished")
        shards = [record.shard for record in records.values() if record.shard is not None]
        skipped = [sample for record in records.values() for sample in record.skipped]
        if not shards:
            raise CachekdError(
                "a cache needs at least one sample",
                where=str(self.path),
                found=f"none, {len(skipped)} were left out" + (f": {skipped[0].reason}" if skipped else ""),
            )
        sketch = self.sketch_info()
        if sketch is None and any(shard.sketch is not None for shard in shards):
            raise CachekdError("the tail sketch is missing", where=str(self.path / SKETCH_FILE))
        try:
            manifest = Manifest(
                teacher=self.plan.teacher,
                fingerprints=self.plan.fingerprints,
                codec=self.plan.codec,
                sources=[self.plan.source],
                sketches=[] if sketch is None else [sketch],
                fidelity=mean_fidelity(shards),
                skipped=skipped_info(skipped),
                shards=shards,
            )
        except ValidationError as error:
            raise CachekdError(
                "the records of the shards do not fit together",
                where=str(self.path / RECORD_FOLDER),
                found=error.errors()[0]["msg"],
                fix="remove the folder, and dump again",
            ) from None
        write_skipped(self.path, skipped)
        path, content = self.path / MANIFEST_FILE, manifest.to_json()
        if not path.exists() or path.read_bytes() != content:
            commit(path, content)
        return Manifest.load(self.path)

    def _record_path(self, number: int) -> Path:
        return self.path / RECORD_FOLDER / f"{number:05d}.json"


def mean_fidelity(shards: list[ShardInfo]) -> Fidelity | None:
    """Of all shards together, by their measured tokens; None where none was measured."""
    return join_fidelities([shard.fidelity for shard in shards if shard.fidelity is not None])


def join_fidelities(parts: list[Fidelity]) -> Fidelity | None:
    """Of all tokens together; None without any."""
    if not parts:
        return None
    tokens = sum(part.tokens for part in parts)
    return Fidelity(
        tokens=tokens,
        kl=round(sum(part.kl * part.tokens for part in parts) / tokens, 6),
        max_error=max(part.max_error for part in parts),
        cosine=round(sum(part.cosine * part.tokens for part in parts) / tokens, 6),
    )


@dataclass(frozen=True)
class Status:
    """Of a dump under way, or of a finished cache.

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
    found = [build.record(number) for number in build.record_numbers() if number < plan.shards]
    records = [record for record in found if record is not None]
    shards = [record.shard for record in records if record.shard is not None]
    return Status(
        finished=False,
        shards=len(records),
        all_shards=plan.shards,
        samples=sum(shard.samples for shard in shards),
        all_samples=plan.source.data.samples,
        skipped=sum(len(record.skipped) for record in records),
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
