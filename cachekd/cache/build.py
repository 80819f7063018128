"""A cache in the making: by one process or by many that never talk to each other.

On the disk, in this order, each file whole or not there (`cachekd.atomic`):

1. dump/plan.json: what is to be done. The first process to write it decides for all.
2. vocabulary.zarr.zip, whose checksum the plan has; sketch.zarr.zip: the first process decides for all.
3. shards/00000.zarr.zip, then dump/00000.json, its record: a shard without a record does not exist. Every
   shard has one writer; writing it twice gives the same bytes.
4. skipped.jsonl, then manifest.json, from the plan and the records alone, by every process that finds all
   records there: again the same bytes.

So a kill at any moment loses the shard that was being made, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from cachekd.atomic import commit, commit_first, is_temporary, make_folder, remove_stale, sync_folder
from cachekd.cache.compare import dependencies, require_same
from cachekd.cache.layout import DUMP_FOLDER, FINISHED_NAME, PLAN_FILE, SHARD_FOLDER, SKETCH_FILE, shard_name
from cachekd.cache.manifest import Fidelity, Manifest, SketchInfo
from cachekd.cache.plan import DumpPlan, FinishedShard, Plan, read_plan, skipped_info, write_skipped
from cachekd.cache.tail.encoder import SketchEncoder, read_encoder, sketch_info
from cachekd.cache.vocabulary import PackedVocabulary
from cachekd.errors import CachekdError
from cachekd.lock import entries, require_new_folder
from cachekd.paths import MANIFEST_FILE


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
    ours = (path / DUMP_FOLDER, path / SHARD_FOLDER)
    inside = [file for folder in ours if folder.is_dir() for file in folder.iterdir()]
    others = [file for file in entries(path) if file not in ours]
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
        make_folder(path / DUMP_FOLDER)
        make_folder(path / SHARD_FOLDER)
        for folder in (path, path / DUMP_FOLDER, path / SHARD_FOLDER):
            remove_stale(folder)
        commit_first(path / PLAN_FILE, plan.to_json())
        found = type(plan).read(path / PLAN_FILE)
        where = "the dump in this folder"
        require_same(dependencies(found, found.source), dependencies(plan, plan.source), where, str(path))
        return cls(path, found)

    def keep_vocabulary(self, make: Callable[[], PackedVocabulary | None]) -> None:
        """Write the vocabulary that the plan has, unless it is there. Every process writes the same bytes.

        Args:
            make: makes it; None where it is not known.

        Raises:
            CachekdError: it is not there, and what is made is another.
        """
        info = self.plan.vocabulary
        if info is None:
            return
        path = self.path / info.name
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == info.sha256:
            return
        made = make()
        if made is None or made.info != info:
            raise CachekdError(
                "the vocabulary is missing, and the tokenizer gives another one than when the dump began",
                where=str(path),
                expected=f"sha256 {info.sha256}",
                found="none" if made is None else f"sha256 {made.info.sha256}",
                fix="restore it, or dump into a new folder",
            )
        commit(path, made.content)

    def encoder(self, fit: Callable[[], SketchEncoder] | None) -> SketchEncoder:
        """The tail sketch that all processes use: the one that is there, or a new one.

        Args:
            fit: makes one; None where one is there.

        Raises:
            CachekdError: it is gone, and shards were coded with it; or it is damaged.
        """
        path = self.path / SKETCH_FILE
        if not path.exists():
            if fit is None or self.noted_numbers():
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

    def finish_shard(self, number: int, note: FinishedShard) -> None:
        """Say that a shard is finished; its file is there."""
        commit(self._note_path(number), note.to_json())

    def remove_shard(self, number: int) -> None:
        """Take back that a shard is finished, then its file: whoever goes on makes it again."""
        for file in (self._note_path(number), self.shard_path(number)):
            file.unlink(missing_ok=True)
            sync_folder(file.parent)

    def finished(self, number: int) -> FinishedShard | None:
        """Read what is said of a finished shard; None if it is still to be made, or made again."""
        note = self.noted(number)
        shard = self.shard_path(number)
        if note and note.shard and not (shard.exists() and shard.stat().st_size == note.shard.bytes):
            return None
        return note

    def noted(self, number: int) -> FinishedShard | None:
        """Read what is said of a shard, whatever has become of its file; None where that is damaged."""
        path = self._note_path(number)
        if not path.exists():
            return None
        try:
            note = FinishedShard.read(path)
        except CachekdError:
            return None
        return note if note.plan_sha256 == self.plan.sha256 else None

    def noted_numbers(self) -> list[int]:
        """List the shards that something is said of, be it damaged."""
        names = (path.stem for path in (self.path / DUMP_FOLDER).glob("*.json"))
        return sorted(int(name) for name in names if FINISHED_NAME.fullmatch(name))

    def finished_shards(self, count: int) -> dict[int, FinishedShard]:
        """Read what is said of the finished ones among shards 0 to count - 1."""
        found = {number: self.finished(number) for number in range(count)}
        return {number: note for number, note in found.items() if note is not None}

    def assemble(self, count: int) -> Manifest:
        """Write the manifest of `count` finished shards.

        Raises:
            CachekdError: no shard has any sample.
        """
        finished = self.finished_shards(count)
        if len(finished) < count:
            raise ValueError(f"{count - len(finished)} shards are not finished")
        shards = [note.shard for note in finished.values() if note.shard is not None]
        skipped = [sample for note in finished.values() for sample in note.skipped]
        if not shards:
            raise CachekdError(
                "a cache needs at least one sample",
                where=str(self.path),
                found=f"none, {len(skipped)} were left out" + (f": {skipped[0].reason}" if skipped else ""),
            )
        sketch = self.sketch_info()
        if sketch is None and any(shard.sketch is not None for shard in shards):
            raise CachekdError("the tail sketch is missing", where=str(self.path / SKETCH_FILE))
        if (table := self.plan.vocabulary) is not None and not (self.path / table.name).exists():
            raise CachekdError("the vocabulary is missing", where=str(self.path / table.name))
        try:
            manifest = Manifest(
                teacher=self.plan.teacher,
                fingerprints=self.plan.fingerprints,
                codec=self.plan.codec,
                vocabulary=self.plan.vocabulary,
                sources=[self.plan.source],
                sketches=[] if sketch is None else [sketch],
                fidelity=Fidelity.of_all(shard.fidelity for shard in shards),
                skipped=skipped_info(skipped),
                shards=shards,
            )
        except ValidationError as error:
            raise CachekdError(
                "the records of the shards do not fit together",
                where=str(self.path / DUMP_FOLDER),
                found=error.errors()[0]["msg"],
                fix="remove the folder, and dump again",
            ) from None
        write_skipped(self.path, skipped)
        path, content = self.path / MANIFEST_FILE, manifest.to_json()
        if not path.exists() or path.read_bytes() != content:
            commit(path, content)
        return Manifest.load(self.path)

    def _note_path(self, number: int) -> Path:
        return self.path / DUMP_FOLDER / f"{number:05d}.json"


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
