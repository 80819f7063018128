"""Join caches of one teacher without touching their shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cachekd.cache.build import SHARD_FOLDER, SKIPPED_FILE, mean_fidelity, write_skipped
from cachekd.cache.compare import facts, require_same
from cachekd.cache.files import commit, make_folder
from cachekd.cache.manifest import MANIFEST_FILE, Manifest, ShardInfo, SketchInfo, Source
from cachekd.cache.reader import LogitCache
from cachekd.errors import CachekdError


def merge_caches(paths: Sequence[Path], out: Path) -> Manifest:
    """One cache with the samples of all; files are hard links where the file system allows it, else copies.

    Each shard keeps the tail sketch that it was coded with.

    Raises:
        CachekdError: the caches are not of the same teacher, inputs and settings, or share a key.
    """
    caches = [LogitCache(path) for path in paths]
    for cache in caches[1:]:
        ours, theirs = facts(caches[0].manifest), facts(cache.manifest)
        require_same(ours, theirs, f"the cache {paths[0]}", str(cache.path))
    _refuse_common_keys(caches)
    sources: list[Source] = []
    sketches: list[SketchInfo] = []
    shards: list[ShardInfo] = []
    skipped: list[dict[str, str]] = []
    with new_cache(out) as folder:
        for cache in caches:
            manifest = cache.manifest
            numbers = [_place_of_sketch(sketch, cache.path, folder, sketches) for sketch in manifest.sketches]
            for source in manifest.sources:
                if source not in sources:
                    sources.append(source)
            for info in manifest.shards:
                name = f"{len(shards):05d}.zarr.zip"
                link(cache.path / SHARD_FOLDER / info.name, folder / SHARD_FOLDER / name)
                changes = {
                    "name": name,
                    "source": sources.index(manifest.sources[info.source]),
                    "sketch": None if info.sketch is None else numbers[info.sketch],
                }
                shards.append(info.model_copy(update=changes))
            skipped += read_skipped(cache)
        merged = caches[0].manifest.model_copy(
            update={
                "sources": sources,
                "sketches": sketches,
                "shards": shards,
                "fidelity": mean_fidelity(shards),
                "skipped": write_skipped(folder, skipped),
            }
        )
        commit(folder / MANIFEST_FILE, merged.to_json())
    return Manifest.load(out)


@contextmanager
def new_cache(out: Path) -> Iterator[Path]:
    """A folder with shards/ that becomes `out` when the block has run, and vanishes when it fails.

    Raises:
        CachekdError: `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CachekdError(
            "the folder for the cache already holds something",
            where=str(out),
            expected="a new or empty folder: nothing is ever overwritten",
            fix="choose another --out",
        )
    staging = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    make_folder(staging / SHARD_FOLDER)
    try:
        yield staging
        if out.exists():
            out.rmdir()
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def link(old: Path, new: Path) -> None:
    """The same file under another name, or a copy on another file system. Files of a cache never change."""
    try:
        os.link(old, new)
    except OSError:
        commit(new, old.read_bytes())


def read_skipped(cache: LogitCache) -> list[dict[str, str]]:
    """{"key", "reason"} of each sample that was left out."""
    if cache.manifest.skipped is None:
        return []
    path = cache.path / SKIPPED_FILE
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise CachekdError(
            f"{SKIPPED_FILE} cannot be read", where=str(path), found=str(error), fix="run `cachekd verify`"
        ) from None


def _refuse_common_keys(caches: Sequence[LogitCache]) -> None:
    places: dict[str, LogitCache] = {}
    for cache in caches:
        common = [key for key in cache if key in places]
        if common:
            first = places[common[0]]
            same = first.sample_hash(common[0]) == cache.sample_hash(common[0])
            raise CachekdError(
                "the caches have samples in common",
                where=f"{first.path} and {cache.path}",
                expected="every key in one of them only",
                found=f"{len(common):,} common keys, such as {common[0]!r} "
                f"(with {'the same' if same else 'different'} content)",
                fix="take them out of one of the caches with `cachekd select`",
            )
        places |= dict.fromkeys(cache, cache)


def _place_of_sketch(sketch: SketchInfo, path: Path, folder: Path, sketches: list[SketchInfo]) -> int:
    """Its index in the merged cache; caches that were cut from one share a sketch."""
    for number, other in enumerate(sketches):
        if other.sha256 == sketch.sha256:
            return number
    name = f"sketch-{len(sketches)}.zarr.zip" if sketches else "sketch.zarr.zip"
    link(path / sketch.name, folder / name)
    sketches.append(sketch.model_copy(update={"name": name}))
    return len(sketches) - 1
