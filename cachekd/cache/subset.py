"""Derive a smaller cache: some samples of another, every value as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cachekd.cache.build import SHARD_FOLDER, mean_fidelity, write_skipped
from cachekd.cache.files import commit
from cachekd.cache.manifest import MANIFEST_FILE, Manifest, ShardInfo
from cachekd.cache.merge import link, new_cache, read_skipped
from cachekd.cache.reader import LogitCache
from cachekd.cache.shard import cut_shard, read_keys
from cachekd.errors import CachekdError


def select_samples(path: Path, out: Path, keys: Container[str]) -> Manifest:
    """A cache with those samples of `path` whose key is in `keys`.

    Shards of which all samples are wanted are linked; others are cut, code by code, so that nothing is
    rounded twice.

    Raises:
        CachekdError: no sample is left.
    """
    cache = LogitCache(path)
    shards: list[ShardInfo] = []
    with new_cache(out) as folder:
        for info in cache.manifest.shards:
            file = path / SHARD_FOLDER / info.name
            wanted = [place for place, key in enumerate(read_keys(file)) if key in keys]
            if not wanted:
                continue
            name = f"{len(shards):05d}.zarr.zip"
            if len(wanted) == info.samples:
                link(file, folder / SHARD_FOLDER / name)
                shards.append(info.model_copy(update={"name": name}))
            else:
                shards.append(_cut(file, info, wanted, folder / SHARD_FOLDER / name))
        if not shards:
            raise CachekdError(
                "no sample is left",
                where=str(path),
                expected=f"some of its {len(cache):,} samples",
                fix="loosen the filter; `cachekd select --list` shows what there is",
            )
        smaller = cache.manifest.model_copy(
            update={
                "shards": shards,
                "fidelity": mean_fidelity(shards),
                "skipped": write_skipped(folder, read_skipped(cache)),
            }
        )
        for sketch in cache.manifest.sketches:
            link(path / sketch.name, folder / sketch.name)
        commit(folder / MANIFEST_FILE, smaller.to_json())
    return Manifest.load(out)


def sample_table(cache: LogitCache) -> pd.DataFrame:
    """A row per sample, in the cache's order.

    Columns: `key`; `tokens`; `mean_k`, logprobs kept per token; `logprob`, the teacher's mean logprob of the
    answer tokens; `shard`, its file.
    """
    tables = []
    for number, info in enumerate(cache.manifest.shards):
        targets, starts = cache.shard_targets(number)
        tokens = np.diff(starts)
        logprobs = targets.gather(targets.token_ids[:, None])[:, 0].numpy()
        columns = {
            "tokens": tokens,
            "mean_k": np.add.reduceat(targets.k.numpy(), starts[:-1]) / tokens,
            "logprob": np.add.reduceat(logprobs.astype(np.float64), starts[:-1]) / tokens,
            "shard": info.name,
        }
        tables.append(pd.DataFrame({"key": read_keys(cache.path / SHARD_FOLDER / info.name), **columns}))
    return pd.concat(tables, ignore_index=True)


def filter_keys(table: pd.DataFrame, expression: str) -> list[str]:
    """The keys for which an expression over the table's columns holds, such as `tokens > 5`.

    Raises:
        CachekdError: it is no such expression.
    """
    try:
        chosen: Any = table.eval(expression, engine="python")
        if not isinstance(chosen, pd.Series) or chosen.dtype != bool:
            raise ValueError(f"its value is {type(chosen).__name__}, not true or false for every sample")
    except Exception as error:  # pandas lets through whatever its parser and the columns raise
        raise CachekdError(
            "the filter cannot be used",
            where=f"--filter {expression!r}",
            expected=f"a condition on {', '.join(table.columns)}, such as 'tokens > 5 and logprob < -1'",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
        ) from None
    return list(table["key"][chosen])


def _cut(file: Path, info: ShardInfo, wanted: Sequence[int], out: Path) -> ShardInfo:
    content, tokens, entries = cut_shard(file, wanted, sketch=info.sketch is not None, sha256=info.sha256)
    commit(out, content)
    changes = {
        "name": out.name,
        "span": None,
        "samples": len(wanted),
        "tokens": tokens,
        "entries": entries,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "fidelity": None,  # it was of the whole shard
    }
    return info.model_copy(update=changes)
