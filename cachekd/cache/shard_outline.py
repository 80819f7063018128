"""Parts of a shard's file, for those who do not need what the teacher said: the rest is not decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.arrays import damaged, read_arrays
from cachekd.cache.shard_codes import FORMAT, RULES, keys_of


def read_keys(path: Path) -> list[str]:
    """A shard's sample keys, in order, and nothing else of it.

    Raises:
        CachekdError: as `read_shard`.
    """
    return _keys(path, read_arrays(path, ["sample_keys"], FORMAT, rules=RULES))


def read_identities(path: Path) -> tuple[list[str], NDArray[np.uint8]]:
    """A shard's sample keys and content hashes, [n, 16], and nothing else of it.

    Raises:
        CachekdError: as `read_shard`.
    """
    arrays = read_arrays(path, ["sample_keys", "sample_hashes"], FORMAT, rules=RULES)
    keys, hashes = _keys(path, arrays), arrays["sample_hashes"]
    if len(hashes) != len(keys):
        raise damaged(path, f"{len(keys):,} keys, expected {len(hashes):,}")
    return keys, hashes


def read_outline(path: Path) -> tuple[list[str], int, int]:
    """A shard's keys, and how many tokens and entries it has; the values themselves are not decoded.

    Raises:
        CachekdError: as `read_shard`.
    """
    arrays = read_arrays(path, ["sample_keys", "k"], FORMAT, rules=RULES)
    return _keys(path, arrays), len(arrays["k"]), int(arrays["k"].sum(dtype=np.int64))


def _keys(path: Path, arrays: dict[str, NDArray]) -> list[str]:
    try:
        return keys_of(arrays["sample_keys"])
    except ValueError as error:
        raise damaged(path, str(error)) from None
