"""A cache made of other caches' shards, as they are or cut."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cachekd.cache.build import SHARD_FOLDER, mean_fidelity
from cachekd.cache.files import cannot_write, commit, make_folder, sync_folder
from cachekd.cache.manifest import MANIFEST_FILE, Manifest, ShardInfo, SketchInfo, Skipped, Source
from cachekd.cache.reader import LogitCache, shard_counts
from cachekd.cache.shard import Counts, cut_shard
from cachekd.cache.skipped import skipped_info, write_skipped
from cachekd.errors import CachekdError


class DerivedCache:
    """Collects shards, with the sources and tail sketches that they refer to. See `new_cache`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[ShardInfo] = []
        self._sources: list[Source] = []
        self._sketches: list[SketchInfo] = []

    def add(self, cache: LogitCache, number: int, samples: Sequence[int] | None = None) -> None:
        """Add a shard of `cache`.

        Args:
            samples: places in the shard, ascending; None: the whole of it, as the same file where possible.

        Raises:
            CachekdError: the shard is damaged, or the new folder cannot be written.
        """
        info = cache.manifest.shards[number]
        old, new = cache.path / SHARD_FOLDER / info.name, self._shard_path(len(self.shards))
        if samples is None:
            link(old, new)
        else:
            info = _cut(old, info, samples, new, shard_counts(cache.manifest, number))
        changes = {
            "name": new.name,
            "source": self._place_of_source(cache.manifest.sources[info.source]),
            "sketch": None if info.sketch is None else self._place_of_sketch(cache, info.sketch),
        }
        self.shards.append(info.model_copy(update=changes))

    def finish(self, header: Manifest, skipped: Sequence[Skipped]) -> None:
        """Write the manifest.

        Args:
            header: a manifest with the same teacher, inputs and settings.
            skipped: samples that are in no shard.
        """
        manifest = Manifest(
            teacher=header.teacher,
            fingerprints=header.fingerprints,
            codec=header.codec,
            sources=self._sources,
            sketches=self._sketches,
            fidelity=mean_fidelity(self.shards),
            skipped=skipped_info(skipped),
            shards=self.shards,
        )
        write_skipped(self.folder, skipped)
        commit(self.folder / MANIFEST_FILE, manifest.to_json())

    def _shard_path(self, number: int) -> Path:
        return self.folder / SHARD_FOLDER / f"{number:05d}.zarr.zip"

    def _place_of_source(self, source: Source) -> int:
        if source not in self._sources:
            self._sources.append(source)
        return self._sources.index(source)

    def _place_of_sketch(self, cache: LogitCache, number: int) -> int:
        """Caches that were cut from one share a sketch."""
        sketch = cache.manifest.sketches[number]
        for place, other in enumerate(self._sketches):
            if other.sha256 == sketch.sha256:
                return place
        place = len(self._sketches)
        name = f"sketch-{place}.zarr.zip" if place else "sketch.zarr.zip"
        link(cache.path / sketch.name, self.folder / name)
        self._sketches.append(sketch.model_copy(update={"name": name}))
        return place


@contextmanager
def new_cache(out: Path) -> Iterator[DerivedCache]:
    """A cache in a folder beside `out` that becomes `out` when the block has run, and vanishes when it fails.

    Raises:
        CachekdError: `out` holds something, or cannot be written.
    """
    out = out.resolve()  # "." has no name
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CachekdError(
            "the folder for the cache already holds something",
            where=str(out),
            expected="a new or empty folder: nothing is ever overwritten",
            fix="choose another --out",
        )
    staging = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)  # of a process that had the same number and was killed
    make_folder(staging / SHARD_FOLDER)
    try:
        yield DerivedCache(staging)
        try:
            sync_folder(staging / SHARD_FOLDER)
            if out.exists():  # stays: it may be a mount, or where someone stands
                for part in sorted(staging.iterdir(), key=lambda path: path.name == MANIFEST_FILE):
                    part.rename(out / part.name)
                sync_folder(out)
            else:
                staging.rename(out)
                sync_folder(out.parent)
        except OSError as error:
            raise cannot_write(out, error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def link(old: Path, new: Path) -> None:
    """The same file under another name, or a copy on another file system. Files of a cache never change.

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


def _cut(old: Path, info: ShardInfo, samples: Sequence[int], new: Path, counts: Counts) -> ShardInfo:
    content, tokens, entries = cut_shard(
        old, samples, sketch=info.sketch is not None, sha256=info.sha256, counts=counts
    )
    commit(new, content)
    changes = {
        "span": None,
        "samples": len(samples),
        "tokens": tokens,
        "entries": entries,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "samples_sha256": None,  # these were of the whole shard
        "fidelity": None,
    }
    return info.model_copy(update=changes)
