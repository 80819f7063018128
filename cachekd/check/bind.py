"""Find a cache's samples in whatever data set has their images: by key, and by content under any key.

A cache holds no pixels, but a hash of every sample's messages and pixels. Order, folder and container of the
data do not matter to it. A picture that was encoded again (PNG to JPEG, another size) has other pixels, which
the teacher did not see: it does not match.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cachekd.atomic import write_file
from cachekd.cache import LogitCache
from cachekd.cache.layout import SHARD_FOLDER
from cachekd.cache.sealed import MOST_VALUES, Sealed
from cachekd.cache.shard import read_identities
from cachekd.data import Sample, Samples, read_encoded
from cachekd.data.left_out import reason_of
from cachekd.errors import BadSample, CachekdError
from cachekd.paths import is_address


class Binding(Sealed):
    """binding.json: which sample of a cache a sample of a data set is, where their keys differ."""

    most_fields: ClassVar[int] = MOST_VALUES

    format_version: Literal[1] = 1
    cache_sha256: str = Field(description="of the cache's manifest")
    data: str = Field(description="the data set, as it was named")
    keys: dict[str, str] = Field(description="from the data's key to the cache's, where they differ")
    unbound: list[str] = Field(description="keys of the data of which the cache has no sample")

    @property
    def identity(self) -> str:
        """sha256 over what it says, whatever the cache's checksum is: a repaired cache is bound again."""
        said = [sorted(self.keys.items()), sorted(self.unbound)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def open_bound(path: str | Path, binding: Path | None = None) -> LogitCache:
    """A cache, under the keys of a data set where there is a binding. One at an address is fetched first.

    Raises:
        CachekdError: either cannot be read, or the binding is of another cache.
    """
    if is_address(path):
        from cachekd.hub import local_folder

        path = local_folder(str(path))
    cache = LogitCache(path)
    return cache if binding is None else bound_cache(cache, Binding.read(binding), str(binding))


def bound_cache(cache: LogitCache, binding: Binding, where: str) -> LogitCache:
    """A cache under the keys of the data set that was bound to it.

    A sample of which the cache has nothing is not in it, even where the cache has another under that key:
    training then treats it as it treats any that is missing.

    Args:
        where: the binding's file.

    Raises:
        CachekdError: the binding is of another cache.
    """
    if cache.manifest.sha256 != binding.cache_sha256:
        raise CachekdError(
            "the binding is for another cache",
            where=f"{where} and {cache.path}",
            expected=f"a manifest with sha256 {binding.cache_sha256}",
            found=cache.manifest.sha256,
            fix="run `cachekd bind` with this cache",
        )
    return cache.renamed(binding.keys, without=set(binding.unbound))


@dataclass
class BindReport:
    """How a data set and a cache fit.

    Attributes:
        matched: samples with the same key and content.
        moved: with the same content under another key, from the data's key to the cache's.
        changed: keys that both have, with other content.
        unknown: keys of the data of which the cache has neither key nor content.
        unreadable: keys of the data, and what is wrong with the sample.
        missing: keys of the cache that no sample of the data is.
    """

    matched: int = 0
    moved: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def unbound(self) -> list[str]:
        """Keys of the data that cannot be trained on with this cache."""
        return [*self.changed, *self.unknown, *self.unreadable]

    def write(self, path: Path, cache: LogitCache, data: str) -> None:
        """Write it for `cachekd train --binding`.

        Raises:
            CachekdError: the file cannot be written.
        """
        binding = Binding(
            cache_sha256=str(cache.manifest.sha256), data=data, keys=self.moved, unbound=self.unbound
        )
        write_file(path, binding.to_json())


def bind(
    cache: LogitCache, samples: Samples, *, workers: int = 0, progress: Callable[[int], None] = lambda n: None
) -> BindReport:
    """Read every sample of a data set and look for it in a cache.

    In memory are the keys of both, and 16 bytes for each sample of the cache and each that is not under its
    own key.

    Args:
        workers: processes that read samples; 0: none.
        progress: is told of samples.

    Raises:
        CachekdError: the data set or a shard cannot be read.
    """
    index, report = _Index(cache), BindReport()
    others: list[tuple[str, bytes]] = []
    read = read_encoded(samples, _identity, range(len(samples)), workers=workers)
    for key, found in zip(samples.keys, read, strict=True):
        if isinstance(found, BadSample):
            report.unreadable[key] = reason_of(found)
        elif index.take(key, found):
            report.matched += 1
        else:
            others.append((key, found))
        progress(1)
    # Only now, so that a copy of a sample does not take the place of the sample itself.
    for key, content in others:
        if (moved := index.take_content(content)) is not None:
            report.moved[key] = moved
        elif key in index:
            report.changed.append(key)
        else:
            report.unknown.append(key)
    changed = set(report.changed)
    report.missing = [key for key in index.left() if key not in changed]
    return report


def _identity(sample: Sample) -> bytes:
    return sample.content_hash


class _Index:
    """A cache's samples by key and by content, and which of them were found."""

    def __init__(self, cache: LogitCache) -> None:
        parts = [read_identities(cache.path / SHARD_FOLDER / info.name) for info in cache.manifest.shards]
        self._keys = [key for keys, _ in parts for key in keys]
        self._places = {key: place for place, key in enumerate(self._keys)}
        # Not "S16": numpy takes zeros at the end of such a text for padding, and a hash may end in some.
        self._hashes: NDArray[np.void] = np.concatenate([hashes for _, hashes in parts]).view("V16")[:, 0]
        self._order = np.argsort(self._hashes, kind="stable")
        self._sorted = self._hashes[self._order]
        self._taken = np.zeros(len(self._keys), bool)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def take(self, key: str, content: bytes) -> bool:
        """Whether the sample is there under this key."""
        place = self._places.get(key)
        if place is None or self._hashes[place].tobytes() != content:
            return False
        self._taken[place] = True
        return True

    def take_content(self, content: bytes) -> str | None:
        """The key of a sample with this content; of several equal ones, one that was not taken yet."""
        first, last = (int(np.searchsorted(self._sorted, np.void(content), side)) for side in _SIDES)
        places = self._order[first:last]
        if not len(places):
            return None
        free = places[~self._taken[places]]
        place = int(free[0] if len(free) else places[0])
        self._taken[place] = True
        return self._keys[place]

    def left(self) -> Iterator[str]:
        """Keys of samples that were not taken."""
        return (self._keys[place] for place in np.flatnonzero(~self._taken))


_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
