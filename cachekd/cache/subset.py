"""Derive a smaller cache: some samples of another, every value as it was."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cachekd.cache.derive import new_cache
from cachekd.cache.manifest import Manifest
from cachekd.cache.plan import read_skipped
from cachekd.cache.reader import LogitCache
from cachekd.errors import CachekdError, first_line

_COLUMNS = ("key", "tokens", "mean_k", "logprob", "shard")
# What a filter may be made of, beside comparisons, if its value at a sample follows from that sample alone.
_PLAIN = (ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.boolop, ast.operator, ast.unaryop, ast.Constant)
_OF_TEXT = ("contains", "endswith", "fullmatch", "len", "lower", "match", "startswith", "upper")


def select_chosen(cache: LogitCache, out: str | Path, chosen: Sequence[NDArray[np.bool_]]) -> Manifest:
    """A cache with some samples of another.

    Shards of which all samples are wanted are linked; others are cut, code by code, so that nothing is
    rounded twice.

    Args:
        chosen: of each shard's samples, in their order, whether it is wanted.

    Raises:
        CachekdError: no sample is left, or a shard that has to be cut is damaged.
    """
    with new_cache(out) as new:
        for number, wanted in enumerate(chosen):
            if wanted.any():
                new.add(cache, number, None if wanted.all() else np.flatnonzero(wanted).tolist())
        if not new.shards:
            raise CachekdError(
                "no sample is left",
                where=str(cache.path),
                expected=f"some of its {len(cache):,} samples",
                fix="loosen the filter; `cachekd select --list` shows what there is",
            )
        new.finish("select", [cache.manifest], read_skipped(cache.path, cache.manifest.skipped))
    return Manifest.load(out)


def choose_samples(
    cache: LogitCache, keys: Container[str] | None = None, match: str | None = None, filter: str | None = None
) -> list[NDArray[np.bool_]]:
    """Ask for each shard's samples, in their order, whether all conditions hold: a byte a sample.

    Args:
        keys: those that are wanted.
        match: a pattern of keys, such as "coco/*".
        filter: an expression, see `filter_samples`.

    Raises:
        CachekdError: the filter is no such expression, or a shard is damaged.
    """
    pattern = re.compile(fnmatch.translate(match or "*"))
    chosen = with_keys(cache, lambda key: (keys is None or key in keys) and pattern.match(key) is not None)
    if filter is None:
        return chosen
    return [some & others for some, others in zip(chosen, filter_samples(cache, filter), strict=True)]


def with_keys(cache: LogitCache, wanted: Callable[[str], bool]) -> list[NDArray[np.bool_]]:
    """Ask for each shard's samples, in their order, whether the key is wanted."""
    shards = range(len(cache.manifest.shards))
    return [np.array([wanted(key) for key, _ in cache.names(number)]) for number in shards]


def shard_table(cache: LogitCache, number: int) -> pd.DataFrame:
    """Make a table of a shard with a row per key, in the samples' order.

    Columns: `key`; `tokens`; `mean_k`, logprobs kept per token; `logprob`, the teacher's mean logprob of the
    answer tokens; `shard`, its file.

    Raises:
        CachekdError: the shard is damaged.
    """
    targets, starts = cache.shard_targets(number)
    tokens = np.diff(starts)
    logprobs = targets.gather(targets.token_ids[:, None])[:, 0].numpy()
    columns = {
        "tokens": tokens,
        "mean_k": np.add.reduceat(targets.k.numpy(), starts[:-1]) / tokens,
        "logprob": np.add.reduceat(logprobs.astype(np.float64), starts[:-1]) / tokens,
        "shard": cache.manifest.shards[number].name,
    }
    names = cache.names(number)
    rows = pd.DataFrame(columns).iloc[[position for _, position in names]]
    rows.insert(0, "key", [key for key, _ in names])
    return rows.reset_index(drop=True)


def shard_tables(cache: LogitCache) -> Iterator[pd.DataFrame]:
    """Make the `shard_table` of one shard after the other."""
    return (shard_table(cache, number) for number in range(len(cache.manifest.shards)))


def sample_table(cache: LogitCache) -> pd.DataFrame:
    """All of `shard_tables` in one; some 200 bytes a sample."""
    return pd.concat(shard_tables(cache), ignore_index=True)


def filter_samples(cache: LogitCache, expression: str) -> list[NDArray[np.bool_]]:
    """Ask for each shard's samples, in their order, whether an expression holds: see `filter_rows`.

    Shard by shard, unless its value at a sample may depend on others, as in `logprob < logprob.median()`.

    Raises:
        CachekdError: it is no such expression, or a shard is damaged.
    """
    if is_by_sample(expression):
        return [filter_rows(table, expression) for table in shard_tables(cache)]
    holds = filter_rows(sample_table(cache), expression)
    return np.split(holds, np.cumsum([info.samples for info in cache.manifest.shards])[:-1])


def filter_rows(table: pd.DataFrame, expression: str) -> NDArray[np.bool_]:
    """Find the rows in which an expression over the table's columns holds, such as `tokens > 5`.

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
            found=first_line(error),
        ) from None
    return chosen.to_numpy()


def is_by_sample(expression: str) -> bool:
    """Whether a filter's value at a sample surely follows from that sample alone.

    >>> is_by_sample("tokens > 5 and key.str.startswith('coco')"), is_by_sample("logprob < logprob.mean()")
    (True, False)
    """
    try:
        return _is_by_sample(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False  # pandas will say what is wrong with it


def _is_by_sample(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return name in _COLUMNS  # pandas knows others: `index`
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _is_by_sample(left) and all(map(_may_be_compared, ops, others))
        case ast.Call(func=ast.Attribute(ast.Attribute(ast.Name(), "str"), name), args=given, keywords=named):
            values = [*given, *(keyword.value for keyword in named)]
            return name in _OF_TEXT and all(isinstance(value, ast.Constant) for value in values)
    return isinstance(node, _PLAIN) and all(map(_is_by_sample, ast.iter_child_nodes(node)))


def _may_be_compared(operator: ast.cmpop, other: ast.AST) -> bool:
    """Allow `in` for a list of numbers or texts alone: a column would be looked through as a whole."""
    if not isinstance(operator, ast.In | ast.NotIn):
        return _is_by_sample(other)
    return isinstance(other, ast.List | ast.Tuple) and all(isinstance(v, ast.Constant) for v in other.elts)
