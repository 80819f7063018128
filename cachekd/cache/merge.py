"""Join caches of one teacher without touching their shards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from cachekd.cache.compare import facts, require_same
from cachekd.cache.derive import new_cache
from cachekd.cache.key_index import KeyIndex
from cachekd.cache.manifest import Manifest
from cachekd.cache.plan import Skipped
from cachekd.cache.reader import LogitCache
from cachekd.cache.skipped import read_skipped
from cachekd.errors import CachekdError


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
        require_same(facts(first.manifest), facts(cache.manifest), f"the cache {first.path}", str(cache.path))
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
