"""Caches, as `cachekd dump` makes them and without a model; ways to look into them and to break them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cachekd.cache import (
    CodecSettings,
    DataInfo,
    Fingerprints,
    LogitCache,
    LogitCacheWriter,
    Manifest,
    TeacherInfo,
    TokenTargets,
    sealed,
    select_topk,
    verify_files,
)
from cachekd.cache.container import read_arrays
from cachekd.cache.layout import VOCABULARY_FILE
from cachekd.cache.shard import pack_shard, read_shard
from cachekd.cache.subset import select_chosen, with_keys
from cachekd.config import DumpConfig
from cachekd.dump import dump
from cachekd.paths import MANIFEST_FILE
from cachekd.vocabulary import TokenBytes
from tiny import tar_members, write_tar

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "cache" / "golden"
GOLDEN_SKETCH = ROOT / "tests" / "cache" / "golden_sketch"
GOLDEN_VOCABULARY = ROOT / "tests" / "cache" / "golden_vocabulary"
VOCAB = 97
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


def cached(settings: dict, folder: Path, **how: Any) -> Path:
    """The cache of a run's teacher and data, made once in a folder as `cachekd dump` writes it."""
    out = folder / "-".join(["cache", *map(str, how.values())])
    if not out.exists():
        dump(DumpConfig(teacher=settings["teacher"], data=settings["data"], out=out, **how))
    return out


def replace_vocabulary(path: Path, content: bytes) -> None:
    """Another file of what ids stand for, with checksum and seal that fit."""
    file = path / VOCABULARY_FILE
    file.unlink()  # it may be linked
    file.write_bytes(content)
    info = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(path / "manifest.json", lambda values: values["vocabulary"].update(info))
    shutil.rmtree(path / "dump", ignore_errors=True)


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


# ---- without a model


def logits_of(rows: int, seed: int, vocab: int = VOCAB, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def header(**codec) -> dict:
    return {
        "teacher": TeacherInfo(
            name="golden/teacher",
            model_type="llava",
            dtype="float32",
            vocab_size=VOCAB,
            weights_sha256="0" * 64,
            config_sha256="1" * 64,
        ),
        "fingerprints": Fingerprints(
            tokenizer="a", chat_template="b", image_processor="c", image_token="<image>"
        ),
        "data": DataInfo(path="data", samples=4, sha256="d"),
        "codec": CodecSettings(**{"top_k": 32, "top_p": 0.99, "window": 64, "min_k": 2} | codec),
        "versions": {"cachekd": "0"},
    }


def sample(index: int, **select) -> tuple[str, TokenTargets, bytes]:
    rows = 1 + index % 3
    options = {"top_k": 32, "window": 64} | select
    targets = select_topk(logits_of(rows, index), torch.arange(rows) + index, **options)
    return f"sample/{index:03d} é", targets, bytes([index % 256]) * 16


def write_cache(path: Path, count: int = 4, **options) -> Path:
    with LogitCacheWriter(path, **header(), **options) as writer:
        for index in range(count):
            writer.add(*sample(index))
    return path


def table_of(count: int = VOCAB + 2) -> TokenBytes:
    """What ids stand for: names, every byte, runs of blanks, parts of characters, the same twice, nothing."""
    odd = [b"<s>", b"<|im_end|>", b"", b" " * 300, "é".encode()[:1], "猫".encode(), b"\n\t", b" the", b" the"]
    contents = [*odd, *(bytes([number % 256]) for number in range(count - len(odd)))]
    return TokenBytes(tuple(contents[:count]), frozenset({0, 1}), 1)


def model_states(tokens: int, width: int, vocab: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states with a falling spectrum and a mean, and a head: [N, d], [V, d]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0.3, -1.2, width)[:, None]
    hidden = torch.randn(tokens, width, generator=generator) @ mixing
    hidden += torch.randn(width, generator=generator)
    return hidden, torch.randn(vocab, width, generator=generator) / 2


def token_ids(count: int) -> torch.Tensor:
    return torch.arange(count) % 7


def true_logprobs(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    return (hidden.double() @ head.double().T).log_softmax(-1).float()


# ---- what is stored


def stored(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Of each sample the integers on the disk, before anything is decoded; ids instead of their ranks."""
    found = {}
    for info in Manifest.load(path).shards:
        names = ["sample_offsets", "sample_keys", "sample_hashes", "token_ids", "k", "beyond_knee", "tail"]
        names += ["ranked_ids", "topk_ranks", "topk_gaps"]
        names += ["sketch_coordinates", "sketch_shift"] if info.sketch is not None else []
        arrays = read_arrays(path / "shards" / info.name, names, {}, info.sha256)
        keys = arrays["sample_keys"].tobytes().decode().split("\n")
        starts = arrays["sample_offsets"].astype(int)
        entries = np.concatenate([[0], np.cumsum(arrays["k"], dtype=int)])
        ids = arrays["ranked_ids"][arrays["topk_ranks"]]
        for place, key in enumerate(keys):
            first, last = starts[place : place + 2]
            some = slice(entries[first], entries[last])
            found[key] = {
                "hash": arrays["sample_hashes"][place],
                **{name: arrays[name][first:last] for name in ("token_ids", "k", "beyond_knee", "tail")},
                "ids": ids[some],
                "gaps": arrays["topk_gaps"][some],
            }
            if info.sketch is not None:
                found[key]["coordinates"] = arrays["sketch_coordinates"][:, first:last]
                found[key]["shift"] = arrays["sketch_shift"][first:last]
    return found


def repack(path: Path, number: int, change: Any, step: float = 1 / 16) -> set[str]:
    """Alter the values of a shard, with checksums and seals that fit; returns the keys of its samples."""
    name = Manifest.load(path).shards[number].name
    file = path / "shards" / name
    shard = read_shard(file, step, sketch=Manifest.load(path).shards[number].sketch is not None)
    shard = replace(shard, targets=change(shard.targets))
    file.unlink()
    file.write_bytes(pack_shard(shard, step))
    content = file.read_bytes()
    info = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "entries": len(shard.targets.ids),
    }
    reseal(path / "manifest.json", lambda values: values["shards"][number].update(info))
    shutil.rmtree(path / "dump", ignore_errors=True)
    assert verify_files(path) == []
    return set(shard.keys)


def of_an_earlier_version(path: Path | str, **teacher: Any) -> str:
    """Make a cache one that does not say what its token ids stand for, of a teacher that these change."""
    path = Path(path)
    manifest = LogitCache(path).manifest
    assert manifest.vocabulary is not None
    (path / manifest.vocabulary.name).unlink()
    older = {"vocabulary": None, "teacher": manifest.teacher.model_copy(update=teacher)}
    (path / MANIFEST_FILE).write_bytes(manifest.model_copy(update=older).to_json())
    return str(path)
