"""Where each key of a cache is: by its hash in sorted arrays, which a forked worker does not copy.

A dict of keys takes some 200 bytes for each, and page after page of it is copied in every worker, as Python
counts references in it. This takes 16 bytes and the key's own text.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import islice

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, int]  # the number of a shard, and a sample's position in it
_TYPED = 64  # characters of a key that typing errors are looked for in


class KeyIndex:
    """Keys of the samples of a cache's shards. A key that is there twice is where it is last.

    Args:
        shards: the keys of each, in the samples' order.
    """

    def __init__(self, shards: Iterable[list[str]]) -> None:
        self._texts: list[bytes] = []  # of each shard: its keys, one per line
        self._starts = [0]  # of each shard, counted in samples; and where the last one ends
        hashes, ends = [], []
        for keys in shards:
            text = "\n".join(keys).encode()
            breaks = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
            self._texts.append(text)
            self._starts.append(self._starts[-1] + len(keys))
            hashes.append(np.fromiter(map(hash, keys), np.int64, len(keys)))
            ends.append(np.append(breaks, len(text)).astype(np.uint32))
        found: NDArray[np.int64] = np.concatenate(hashes)
        order = np.argsort(found, kind="stable").astype(np.uint32)
        found = found[order]
        # `bisect` reads a memoryview faster than an array.
        self._hashes, self._order, self._ends = found.data, order.data, np.concatenate(ends).data
        alike = np.flatnonzero(found[1:] == found[:-1]) + 1
        self._repeated = {self._order[at] for at in alike.tolist() if self._is_repeated(at)}

    def __len__(self) -> int:
        return self._starts[-1] - len(self._repeated)

    def __iter__(self) -> Iterator[str]:
        for number, start in enumerate(self._starts[:-1]):
            for key, position in self.names(number):
                if start + position not in self._repeated:
                    yield key

    def __reduce__(self) -> tuple[object, ...]:
        return _indexed, (self._texts,)  # another process hashes in another way

    def names(self, number: int) -> list[tuple[str, int]]:
        """The keys in a shard, each with its sample's position there."""
        keys = self._texts[number].decode().split("\n")
        return [(key, position) for position, key in enumerate(keys)]

    def find(self, key: object) -> Place | None:
        """Where a key's sample is; None if there is none."""
        if not isinstance(key, str):
            return None
        code, text = hash(key), key.encode(errors="surrogatepass")
        found = self._alike(code, bisect_right(self._hashes, code))
        return next((self._place(sample) for sample in found if self._text(sample) == text), None)

    def _alike(self, code: int, end: int) -> Iterator[int]:
        """Samples whose keys have this hash, from before `end` in the sorted arrays, the last one first."""
        while end and self._hashes[end - 1] == code:
            end -= 1
            yield self._order[end]

    def _is_repeated(self, at: int) -> bool:
        text = self._text(self._order[at])
        return any(self._text(earlier) == text for earlier in self._alike(self._hashes[at], at))

    def _place(self, sample: int) -> Place:
        number = bisect_right(self._starts, sample) - 1
        return number, sample - self._starts[number]

    def _text(self, sample: int) -> bytes:
        number, position = self._place(sample)
        first = self._ends[sample - 1] + 1 if position else 0
        return self._texts[number][first : self._ends[sample]]


class RenamedKeys:
    """An index of the same samples under other keys.

    Args:
        keys: as they were.
        places: of the samples with new keys, by these.
        without: keys that are not there any more.
    """

    def __init__(
        self, keys: KeyIndex | RenamedKeys, places: Mapping[str, Place], without: Container[str]
    ) -> None:
        self._keys, self._places, self._without = keys, places, without
        self._names: dict[int, list[tuple[str, int]]] = {}  # the new ones of each shard
        for key, (number, position) in places.items():
            self._names.setdefault(number, []).append((key, position))
        self._count = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        yield from (key for key in self._keys if key not in self._without)
        yield from (key for key in self._places if key in self._without or self._keys.find(key) is None)

    def names(self, number: int) -> list[tuple[str, int]]:
        """The keys in a shard, each with its sample's position there, by that; a sample may have several."""
        same = [
            (key, position)
            for key, position in self._keys.names(number)
            if self.find(key) == (number, position) and key not in self._places
        ]
        return sorted([*same, *self._names.get(number, [])], key=lambda name: name[1])

    def find(self, key: object) -> Place | None:
        """Where a key's sample is; None if there is none."""
        if not isinstance(key, str):
            return None
        if key in self._places:
            return self._places[key]
        return None if key in self._without else self._keys.find(key)


def near_keys(key: str, known: Container[str], examples: Iterable[str], most: int = 3) -> list[str]:
    """Keys that may have been meant: one typing error away, or else the most alike of some examples."""
    start, end = key[:_TYPED], key[_TYPED:]
    meant = (other + end for other in dict.fromkeys(_mistyped(start)) if other + end in known)
    return list(islice(meant, most)) or difflib.get_close_matches(key, examples, n=most, cutoff=0.0)


def _mistyped(key: str) -> Iterator[str]:
    """Texts that are `key` but for a character too many, missing or wrong, or two in the wrong order."""
    letters = sorted({*key, *"0123456789"})
    for at in range(len(key) + 1):
        before, after = key[:at], key[at:]
        yield before + after[1:]
        yield before + after[1:2] + after[:1] + after[2:]
        for letter in letters:
            yield before + letter + after
            yield before + letter + after[1:]


def _indexed(texts: list[bytes]) -> KeyIndex:
    return KeyIndex(text.decode().split("\n") for text in texts)
