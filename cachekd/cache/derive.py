"""Caches made of caches, shard by shard; merging is one of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from cachekd.atomic import commit, make_folder, sync_folder
from cachekd.cache.compare import dependencies, require_same
from cachekd.cache.key_index import KeyIndex
from cachekd.cache.layout import SHARD_FOLDER, SKETCH_FILE, shard_name
from cachekd.cache.manifest import (
    CodecSettings,
    Derivation,
    Fidelity,
    Fingerprints,
    Manifest,
    ShardInfo,
    SketchInfo,
    VocabularyInfo,
)
from cachekd.cache.plan import Skipped, SkippedSamples, read_skipped, skipped_info, write_skipped
from cachekd.cache.reader import LogitCache, listed_codes
from cachekd.cache.shard import cut_codes
from cachekd.cache.source import Source
from cachekd.cache.tail.encoder import SketchEncoder, sketch_info
from cachekd.cache.vocabulary import read_vocabulary, require_same_vocabulary
from cachekd.errors import CachekdError
from cachekd.lock import staged_folder
from cachekd.paths import MANIFEST_FILE


class DerivedCache:
    """Collects shards, with the sources and tail sketches that they refer to, and the vocabulary that all
    have. See `new_cache`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[ShardInfo] = []
        self._sources: list[Source] = []
        self._sketches: list[SketchInfo] = []
        self._vocabulary: VocabularyInfo | None = None

    def add(self, cache: LogitCache, number: int, samples: Sequence[int] | None = None) -> None:
        """Add a shard of `cache`.

        Args:
            samples: places in the shard, ascending; None: the whole of it, as the same file where possible.

        Raises:
            CachekdError: the shard is damaged, or the new folder cannot be written.
        """
        info = cache.manifest.shards[number]
        sketch = None if info.sketch is None else self.link_sketch(cache, info.sketch)
        if samples is not None:
            self.add_recoded(cache, number, *_cut(cache, number, samples), sketch)
            return
        new = self._shard_path(len(self.shards))
        link(cache.path / SHARD_FOLDER / info.name, new)
        self._append(cache, info, {"name": new.name, "sketch": sketch})

    def add_recoded(
        self, cache: LogitCache, number: int, content: bytes, changes: dict[str, Any], sketch: int | None
    ) -> None:
        """Add a shard of `cache` whose codes are others by now, or fewer.

        Args:
            content: its file.
            changes: what else is different in its `ShardInfo`.
            sketch: as `add_sketch` has it.
        """
        new = self._shard_path(len(self.shards))
        commit(new, content)
        changes = {
            "name": new.name,
            "sketch": sketch,
            "span": None,  # a teacher would make another file of it
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "fidelity": None,
            **changes,
        }
        self._append(cache, cache.manifest.shards[number], changes)

    def add_sketch(self, encoder: SketchEncoder) -> int:
        """Add a new tail sketch; returns its place in the manifest."""
        place, content = len(self._sketches), encoder.pack()
        info = sketch_info(_sketch_name(place), encoder, content)
        commit(self.folder / info.name, content)
        self._sketches.append(info)
        return place

    def link_sketch(self, cache: LogitCache, number: int) -> int:
        """Add a tail sketch of `cache` as it is, unless it is there; returns its place in the manifest."""
        sketch = cache.manifest.sketches[number]
        for place, other in enumerate(self._sketches):
            if other.sha256 == sketch.sha256:  # caches that were cut from one share a sketch
                return place
        name = _sketch_name(len(self._sketches))
        link(cache.path / sketch.name, self.folder / name)
        self._sketches.append(sketch.model_copy(update={"name": name}))
        return len(self._sketches) - 1

    def link_vocabulary(self, cache: LogitCache) -> None:
        """Add the vocabulary of `cache`, if it has one, unless there is one already.

        Raises:
            CachekdError: the one that is there says something else.
        """
        info, there = cache.manifest.vocabulary, self._vocabulary
        if info is None or info == there:
            return
        if there is None:
            link(cache.path / info.name, self.folder / info.name)
            self._vocabulary = info
            return
        # Other bytes may say the same: another version of the compressor has written them.
        ours, where = read_vocabulary(self.folder / there.name, there), cache.path / info.name
        require_same_vocabulary(ours, read_vocabulary(where, info), str(where))

    def finish(
        self,
        operation: Literal["select", "merge", "recompress"],
        parents: Sequence[Manifest],
        skipped: list[Skipped] | SkippedSamples,
        *,
        codec: CodecSettings | None = None,
        fidelity: Fidelity | None = None,
    ) -> None:
        """Write the manifest.

        Args:
            operation, fidelity: for the lineage.
            parents: what it was made from, all with the same teacher, inputs and settings.
            skipped: samples that are in no shard.
            codec: the settings by now; None: the parents'.
        """
        manifest = Manifest(
            teacher=parents[0].teacher,
            fingerprints=_fingerprints_of_all(parents),
            codec=codec or parents[0].codec,
            vocabulary=self._vocabulary,
            sources=self._sources,
            sketches=self._sketches,
            fidelity=Fidelity.of_all(shard.fidelity for shard in self.shards),
            skipped=skipped_info(skipped),
            lineage=_lineage(operation, parents, fidelity),
            shards=self.shards,
        )
        write_skipped(self.folder, skipped)
        commit(self.folder / MANIFEST_FILE, manifest.to_json())

    def _shard_path(self, number: int) -> Path:
        return self.folder / SHARD_FOLDER / shard_name(number)

    def _append(self, cache: LogitCache, info: ShardInfo, changes: dict[str, Any]) -> None:
        source = cache.manifest.sources[info.source]
        if source not in self._sources:
            self._sources.append(source)
        self.link_vocabulary(cache)
        self.shards.append(info.model_copy(update={**changes, "source": self._sources.index(source)}))


def _fingerprints_of_all(parents: Sequence[Manifest]) -> Fingerprints:
    """What holds for every parent; they differ, if at all, in the encoding, which may be unknown, and in the
    reading of images."""
    first = parents[0].fingerprints
    differ = [name for name, value in first if any(getattr(p.fingerprints, name) != value for p in parents)]
    return first.model_copy(update=dict.fromkeys(differ))


def _sketch_name(place: int) -> str:
    return f"sketch-{place}.zarr.zip" if place else SKETCH_FILE


def _lineage(
    operation: Literal["select", "merge", "recompress"],
    parents: Sequence[Manifest],
    fidelity: Fidelity | None,
) -> list[Derivation]:
    """List the parents' steps, each once, and this one."""
    steps: list[Derivation] = []
    for parent in parents:
        if parent.lineage:
            last = parent.lineage[-1].model_copy(update={"result": parent.sha256})
            steps += [step for step in (*parent.lineage[:-1], last) if step not in steps]
    this = Derivation(
        operation=operation,
        version=version("cachekd"),
        parents=[str(parent.sha256) for parent in parents],
        parent_samples=sum(parent.samples for parent in parents),
        parent_codec=parents[0].codec,
        fidelity=fidelity,
    )
    return [*steps, this]


@contextmanager
def new_cache(out: str | Path) -> Iterator[DerivedCache]:
    """A cache in a folder beside `out` that becomes `out` when the block has run, and vanishes when it fails.

    Raises:
        CachekdError: `out` holds something, or cannot be written.
    """
    with staged_folder(out, "cache", last=MANIFEST_FILE) as staging:
        make_folder(staging / SHARD_FOLDER)
        yield DerivedCache(staging)
        sync_folder(staging / SHARD_FOLDER)


def link(old: Path, new: Path) -> None:
    """Give a file another name, or copy it to another file system. Files of a cache never change.

    Raises:
        CachekdError: the old one cannot be read, or the new one not be written.
    """
    try:
        os.link(old.resolve(), new)  # what a symbolic link points at: the link may be relative
    except OSError:
        try:
            content = old.read_bytes()
        except OSError as error:
            raise CachekdError(
                "a file cannot be read", where=str(old), found=error.strerror or str(error)
            ) from None
        commit(new, content)


def _cut(cache: LogitCache, number: int, samples: Sequence[int]) -> tuple[bytes, dict[str, Any]]:
    """Cut some samples out of a shard: the new file, and what is different in its `ShardInfo`."""
    info = cache.manifest.shards[number]
    content, tokens, entries = cut_codes(listed_codes(cache.path, cache.manifest, number), samples)
    return content, {
        "samples": len(samples),
        "without_image": 0 if info.without_image == 0 else None,
        "cut": 0 if info.cut == 0 else None,
        "tokens": tokens,
        "entries": entries,
        "samples_sha256": None,  # these were of the whole shard
    }


def merge_caches(paths: Sequence[str | Path], out: str | Path) -> Manifest:
    """One cache with the samples of all; files are hard links where the file system allows it, else copies.

    Each shard keeps the tail sketch that it was coded with.

    Raises:
        CachekdError: the caches are not of the same teacher, inputs and settings, or share a key.
    """
    if len(paths) < 2:
        raise CachekdError("there is nothing to merge", expected="two caches or more", found=len(paths))
    caches = [LogitCache(path) for path in paths]
    first = caches[0]
    for cache in caches[1:]:
        require_same(
            dependencies(first.manifest),
            dependencies(cache.manifest),
            f"the cache {first.path}",
            str(cache.path),
        )
    _refuse_common_keys(caches)
    with new_cache(out) as new:
        for cache in caches:
            for number in range(len(cache.manifest.shards)):
                new.add(cache, number)
        new.finish("merge", [cache.manifest for cache in caches], _skipped_by_all(caches))
    return Manifest.load(out)


def _skipped_by_all(caches: Sequence[LogitCache]) -> list[Skipped]:
    """Samples that no cache has, once each."""
    skipped = [sample for cache in caches for sample in read_skipped(cache.path, cache.manifest.skipped)]
    return [sample for sample in dict.fromkeys(skipped) if not any(sample.key in cache for cache in caches)]


def _refuse_common_keys(caches: Sequence[LogitCache]) -> None:
    shards = ((cache, number) for cache in caches for number in range(len(cache.manifest.shards)))
    every = KeyIndex([key for key, _ in cache.names(number)] for cache, number in shards)
    if len(every) == sum(map(len, caches)):  # else, of every two: which, which takes long
        return
    for first, cache in combinations(caches, 2):
        common = [key for key in cache if key in first]
        if common:
            same = first.sample_hash(common[0]) == cache.sample_hash(common[0])
            raise CachekdError(
                "the caches have samples in common",
                where=f"{first.path} and {cache.path}",
                expected="every key in one of them only",
                found=f"{len(common):,} common keys, such as {common[0]!r} "
                f"(with {'the same' if same else 'different'} content)",
                fix="take them out of one of the caches with `cachekd select`",
            )
