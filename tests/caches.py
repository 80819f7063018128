"""Caches as `cachekd dump` makes them, and ways to break them, for the integrity tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from tiny import tar_members, write_tar

from cachekd.cache import LogitCache, Manifest, sealed
from cachekd.cache.subset import select_chosen, with_keys
from cachekd.config import DumpConfig
from cachekd.dump import dump

SMALL = {"batch_size": 2, "shard_samples": 6, "calibration_tokens": 60}


def write_data(folder: Path, count: int, *, start: int = 0, bad: tuple[int, ...] = ()) -> Path:
    """A tar of samples `start` to `start + count`, some with an image that is none."""
    members = tar_members(count, start=start)
    for index in bad:
        name, _ = members[2 * (index - start)]
        members[2 * (index - start)] = (name, b"not a png")
    write_tar(folder / "0.tar", members)
    return folder


def dump_cache(out: Path, teacher: Path, data: Path, **settings: Any) -> Path:
    """A finished cache of several shards."""
    assert dump(DumpConfig(teacher=str(teacher), data=str(data), out=out, **{**SMALL, **settings})).finished
    return out


def select_samples(path: Path, out: Path, keys: Container[str]) -> Manifest:
    """A cache with those samples of `path` whose key is in `keys`."""
    cache = LogitCache(path)
    return select_chosen(cache, out, with_keys(cache, keys.__contains__))


def copied(path: Path, out: Path) -> Path:
    shutil.copytree(path, out)
    return out


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def times_of(path: Path) -> dict[str, int]:
    return {
        str(file.relative_to(path)): file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()
    }


def flip(file: Path, position: int, mask: int = 0x10) -> bytes:
    """Change some bits of one byte; returns the file as it was."""
    content = file.read_bytes()
    position %= len(content)
    file.write_bytes(content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :])
    return content


def reseal(file: Path, change: Callable[[Any], None]) -> None:
    """Change a file's values as someone would who knows how it is sealed."""
    values = json.loads(file.read_bytes())
    change(values)
    del values["sha256"]
    file.write_bytes(sealed._text(values | {"sha256": sealed._seal(values)}))


def assert_same_samples(derived: Path, *originals: Path) -> None:
    """Every sample of `derived` is, value by value, that of the original that has it."""
    cache = LogitCache(derived)
    sources = [LogitCache(path) for path in originals]
    for key in cache:
        (source,) = [original for original in sources if key in original]
        a, b = cache[key], source[key]
        assert cache.sample_hash(key) == source.sample_hash(key)
        for name in ("token_ids", "k", "knee"):
            assert torch.equal(getattr(a, name), getattr(b, name)), (key, name)
        width = a.ids.shape[1]
        assert torch.equal(a.ids, b.ids[:, :width])
        assert torch.equal(a.logprobs, b.logprobs[:, :width])
        assert torch.equal(a.everywhere(), b.everywhere()), key
