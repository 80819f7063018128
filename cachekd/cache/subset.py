"""Derive a smaller cache: some samples of another, every value as it was."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cachekd.cache.build import SHARD_FOLDER
from cachekd.cache.derive import new_cache
from cachekd.cache.manifest import Manifest
from cachekd.cache.reader import LogitCache
from cachekd.cache.shard_outline import read_keys
from cachekd.cache.skipped import read_skipped
from cachekd.errors import CachekdError


def select_samples(path: str | Path, out: str | Path, keys: Container[str]) -> Manifest:
    """A cache with those samples of `path` whose key is in `keys`.

    Shards of which all samples are wanted are linked; others are cut, code by code, so that nothing is
    rounded twice.

    Raises:
        CachekdError: no sample is left.
    """
    cache = LogitCache(path)
    with new_cache(out) as new:
        for number, info in enumerate(cache.manifest.shards):
            found = read_keys(cache.path / SHARD_FOLDER / info.name)
            wanted = [place for place, key in enumerate(found) if key in keys]
            if wanted:
                new.add(cache, number, None if len(wanted) == len(found) else wanted)
        if not new.shards:
            raise CachekdError(
                "no sample is left",
                where=str(path),
                expected=f"some of its {len(cache):,} samples",
                fix="loosen the filter; `cachekd select --list` shows what there is",
            )
        new.finish("select", [cache.manifest], read_skipped(cache.path, cache.manifest.skipped))
    return Manifest.load(out)


def sample_table(cache: LogitCache) -> pd.DataFrame:
    """A row per key, in the samples' order.

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
        names = cache.names(number)
        rows = pd.DataFrame(columns).iloc[[position for _, position in names]]
        rows.insert(0, "key", [key for key, _ in names])
        tables.append(rows)
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
