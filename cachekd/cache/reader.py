"""Read a cache: a mapping from keys to targets, and its samples as sparse rows."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.key_index import KeyIndex, RenamedKeys, near_keys
from cachekd.cache.layout import SHARD_FOLDER, SKIPPED_FILE
from cachekd.cache.manifest import ListedFile, Manifest
from cachekd.cache.sealed import RESTORE
from cachekd.cache.shard import Shard, read_codes, read_keys, read_shard
from cachekd.cache.shard_rules import Counts
from cachekd.cache.sparse_logits import TokenTargets
from cachekd.cache.tail.sketch import TailSketch, read_sketch
from cachekd.cache.targets import CachedTargets
from cachekd.cache.vocabulary import read_vocabulary
from cachekd.errors import CachekdError
from cachekd.vocabulary import TokenBytes

_KEPT_BYTES = 2**30  # decoded shards in memory; training shuffles over more at the price of re-reading
_EXAMPLES = 100  # shards whose first keys show what keys look like


def shard_counts(manifest: Manifest, number: int) -> Counts:
    """What shard `number` must hold."""
    info = manifest.shards[number]
    axes = None if info.sketch is None else manifest.sketches[info.sketch].axes
    recompressed = sum(step.operation == "recompress" for step in manifest.lineage)
    vocab_size, top_k = manifest.teacher.vocab_size, manifest.codec.top_k
    return Counts(info.samples, info.tokens, info.entries, axes, vocab_size, top_k, recompressed)


def listed_codes(path: Path, manifest: Manifest, number: int) -> dict[str, NDArray]:
    """The arrays of shard `number`, compared with all that the manifest says of it.

    Args:
        path: the cache.

    Raises:
        CachekdError: as `read_shard`.
    """
    info, counts = manifest.shards[number], shard_counts(manifest, number)
    file = path / SHARD_FOLDER / info.name
    return read_codes(file, sketch=info.sketch is not None, sha256=info.sha256, counts=counts)


def listed_shard(path: Path, manifest: Manifest, number: int, *, hashed: bool = False) -> Shard:
    """Read shard `number`, decoded.

    Args:
        path: the cache.
        hashed: whether the file's checksum was compared already.

    Raises:
        CachekdError: as `read_shard`.
    """
    info = manifest.shards[number]
    return read_shard(
        path / SHARD_FOLDER / info.name,
        manifest.codec.logprob_step,
        sketch=info.sketch is not None,
        sha256=None if hashed else info.sha256,
        counts=shard_counts(manifest, number),
    )


def listed_sketch(path: Path, manifest: Manifest, number: int | None) -> TailSketch | None:
    """What tokens share of a tail sketch; None for none.

    Args:
        path: the cache.

    Raises:
        CachekdError: it is missing, or not what the manifest says.
    """
    if number is None:
        return None
    info = manifest.sketches[number]
    return read_sketch(path / info.name, info.sha256, (info.axes, manifest.teacher.vocab_size))


def require_sizes(
    path: Path,
    files: Sequence[ListedFile],
    fix: str,
    *,
    missing: str = "a file is missing",
    changed: str = "a file was cut short or changed",
) -> None:
    """Refuse a cache whose files are missing or of other sizes.

    Args:
        path: the cache.
        fix: what brings them back.
        missing, changed: what to say of such a file.

    Raises:
        CachekdError: the first of them.
    """
    for file in files:
        place = path / file.name
        found = place.stat().st_size if place.is_file() else None
        if found != file.bytes:
            raise CachekdError(
                missing if found is None else changed,
                where=str(place),
                expected=f"{file.bytes:,} bytes",
                found="no file" if found is None else f"{found:,} bytes",
                fix=fix,
            )


class LogitCache:
    """A cache of teacher logits; a mapping from sample keys to `CachedTargets`.

    Files are opened per read, so a LogitCache can be pickled and used in forked workers.

    Args:
        path: the cache's folder; `cachekd.hub.local_folder` gives that of a published one.

    Raises:
        CachekdError: there is no manifest, it is of a newer version, or a shard is missing or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self._decoded: OrderedDict[int, Shard] = OrderedDict()
        self._kept_bytes = 0  # by these
        read = [file for file in self.manifest.files if file.name != SKIPPED_FILE]
        require_sizes(self.path, read, RESTORE)
        paths = (self.path / SHARD_FOLDER / info.name for info in self.manifest.shards)
        self._keys: KeyIndex | RenamedKeys = KeyIndex(map(read_keys, paths))

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return self._keys.find(key) is not None

    def __getitem__(self, key: str) -> CachedTargets:
        """The targets of one sample.

        Raises:
            CachekdError: no such key, or its shard is damaged.
        """
        return self._rebuilt(self.shard_of(key), self.sparse(key))

    def renamed(self, keys: Mapping[str, str], *, without: Container[str]) -> LogitCache:
        """Give the samples of this cache other keys.

        Args:
            keys: from a sample's new key to its own; all other samples keep their keys.
            without: keys that the result does not have, even if this cache has them.
        """
        other = copy.copy(self)
        other._decoded, other._kept_bytes = OrderedDict(), 0
        other._keys = RenamedKeys(self._keys, {new: self.place(key) for new, key in keys.items()}, without)
        return other

    def names(self, number: int) -> list[tuple[str, int]]:
        """The keys in a shard, each with its sample's place in it; renamed, a sample may have several."""
        return self._keys.names(number)

    def sparse(self, key: str) -> TokenTargets:
        """Read what is stored of one sample, without the model of its tail; raises as for `cache[key]`."""
        number, position = self.place(key)
        shard = self._shard(number)
        first, last = shard.sample_offsets[position : position + 2]
        return shard.targets.cut(int(first), int(last))

    def shard_samples(self, number: int) -> Iterator[tuple[str, bytes, TokenTargets]]:
        """Yield key, content hash and what is stored for each key of a shard, in the samples' order.

        For a caller that goes through the whole cache: the shard is not kept in memory.

        Raises:
            CachekdError: the shard is damaged.
        """
        shard = self._once(number)
        parts = shard.targets.split(np.diff(shard.sample_offsets).tolist())
        for key, position in self.names(number):
            yield key, shard.hashes[position].tobytes(), parts[position]

    def shard_targets(self, number: int) -> tuple[CachedTargets, NDArray[np.int64]]:
        """All targets of a shard, and where each sample's start and the last one's end: [n + 1].

        For a caller that goes through the whole cache: the shard is not kept in memory.

        Raises:
            CachekdError: it is damaged.
        """
        shard = self._once(number)
        return self._rebuilt(number, shard.targets), shard.sample_offsets

    def _rebuilt(self, number: int, sparse: TokenTargets) -> CachedTargets:
        return CachedTargets.under(self.manifest, sparse, self.sketch(self.manifest.shards[number].sketch))

    def sketch(self, number: int | None = 0) -> TailSketch | None:
        """The part of the tail sketch that all tokens share; None in a cache without a sketch.

        Args:
            number: a merged cache has several.
        """
        return listed_sketch(self.path, self.manifest, number if self.manifest.sketches else None)

    @cached_property
    def vocabulary(self) -> TokenBytes | None:
        """What the teacher's token ids stand for; read when it is first asked for. None where the cache does
        not say it.

        Raises:
            CachekdError: its file is damaged.
        """
        info = self.manifest.vocabulary
        return None if info is None else read_vocabulary(self.path / info.name, info)

    def sample_hash(self, key: str) -> bytes:
        """The 16-byte content hash of the sample that the teacher saw."""
        number, position = self.place(key)
        return self._shard(number).hashes[position].tobytes()

    def shard_of(self, key: str) -> int:
        """The number of the shard that holds a sample."""
        return self.place(key)[0]

    def histogram(self) -> dict[str, dict[int, int]]:
        """How many tokens have each stored k, and each of Kneedle's k."""
        counts: dict[str, Counter[int]] = {"k": Counter(), "knee": Counter()}
        for number in range(len(self.manifest.shards)):
            targets = self._once(number).targets
            for name, counter in counts.items():
                values, found = np.unique(getattr(targets, name), return_counts=True)
                counter.update(dict(zip(values.tolist(), found.tolist(), strict=True)))
        return {name: dict(sorted(counter.items())) for name, counter in counts.items()}

    def __getstate__(self) -> dict[str, object]:
        state = {**self.__dict__, "_decoded": OrderedDict(), "_kept_bytes": 0}
        state.pop("vocabulary", None)  # another process reads it, if it is asked for it
        return state

    def place(self, key: str) -> tuple[int, int]:
        """Where a sample is: the number of its shard, and its position in that.

        Raises:
            CachekdError: no such key.
        """
        if (place := self._keys.find(key)) is None:
            near = near_keys(str(key), self, self._examples())
            raise CachekdError(
                f"the cache has no sample {key!r}",
                where=str(self.path),
                expected=f"one of its {len(self):,} keys" + (f", such as {', '.join(near)}" if near else ""),
                fix=f"`cachekd select {self.path} --list` shows them, with --json all",
            )
        return place

    def _examples(self) -> Iterator[str]:
        shards = len(self.manifest.shards)
        for number in range(0, shards, -(-shards // _EXAMPLES)):
            yield from (key for key, _ in self.names(number)[:1])

    def _shard(self, number: int) -> Shard:
        """Kept in memory, as far as there is room for it."""
        if number in self._decoded:
            self._decoded.move_to_end(number)
            return self._decoded[number]
        shard = self._decoded[number] = self._once(number)
        self._kept_bytes += shard.targets.nbytes
        while len(self._decoded) > 1 and self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= self._decoded.popitem(last=False)[1].targets.nbytes
        return shard

    def _once(self, number: int) -> Shard:
        if number in self._decoded:
            return self._decoded[number]
        return listed_shard(self.path, self.manifest, number)
