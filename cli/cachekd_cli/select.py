"""`cachekd select`: some samples of a cache as a cache of their own."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Container, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachekd.errors import CachekdError
from cachekd_cli.console import console, print_json, print_json_list, say, table
from cachekd_cli.options import AsJson, CacheFolder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cachekd.cache import LogitCache


SHOWN = 20


def select_command(
    cache: CacheFolder,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The new cache's folder.")] = None,
    keys: Annotated[Path | None, typer.Option(help="A file with a key per line; '-': stdin.")] = None,
    match: Annotated[str | None, typer.Option(help="Keys of this pattern, such as 'coco/*'.")] = None,
    filter_: Annotated[
        str | None,
        typer.Option("--filter", help="A condition on key, tokens, mean_k, logprob and shard; see --list."),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the samples; make nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Derive a smaller cache; every value in it is as it was. Conditions are combined: all must hold.

    logprob is the teacher's of the answer tokens, mean per sample: very negative means that the teacher would
    have answered something else.

    Example: cachekd select caches/all -o caches/sure --filter "logprob > -2 and tokens >= 3"
    """
    from cachekd.cache import LogitCache
    from cachekd.cache.subset import select_chosen

    if show == (out is not None):
        raise CachekdError(
            "--out and --list are one or the other",
            found="both" if show else "neither",
            fix="pass --out to make a cache, or --list to look only",
        )
    opened = LogitCache(cache)
    chosen = choose(opened, None if keys is None else read_wanted(opened, keys), match, filter_)
    if out is None:
        print_samples(opened, chosen, as_json)
        return
    if all(some.all() for some in chosen):
        raise CachekdError(
            "nothing is left out",
            where=str(cache),
            fix="pass --keys, --match or --filter, or copy the folder",
        )
    manifest = select_chosen(opened, out, chosen)
    if as_json:
        print_json(
            {"out": out, "samples": manifest.samples, "tokens": manifest.tokens, "bytes": manifest.size}
        )
    else:
        say(f"{out}: {manifest.samples:,} of {len(opened):,} samples, {manifest.tokens:,} answer tokens")


def choose(
    cache: LogitCache, keys: set[str] | None, match: str | None, filter_: str | None
) -> list[NDArray[np.bool_]]:
    """Of each shard's samples, in their order, whether all conditions hold: a byte a sample."""
    from cachekd.cache.subset import filter_samples, with_keys

    pattern = re.compile(fnmatch.translate(match or "*"))
    chosen = with_keys(cache, lambda key: (keys is None or key in keys) and pattern.match(key) is not None)
    if filter_ is None:
        return chosen
    return [some & others for some, others in zip(chosen, filter_samples(cache, filter_), strict=True)]


def print_samples(cache: LogitCache, chosen: Sequence[NDArray[np.bool_]], as_json: bool) -> None:
    """Show samples; all of them as JSON, the first ones as a table."""
    from cachekd.cache.subset import shard_table

    tables = (shard_table(cache, number)[some] for number, some in enumerate(chosen) if some.any())
    if as_json:
        print_json_list(row for rows in tables for row in rows.to_dict("records"))
        return
    count = sum(int(some.sum()) for some in chosen)
    title = f"{count:,} samples of {cache.path}" + (f", the first {SHOWN}" if count > SHOWN else "")
    shown = islice((row for rows in tables for row in rows.itertuples(index=False)), min(count, SHOWN))
    lines = [(row.key, row.tokens, f"{row.mean_k:.1f}", f"{row.logprob:.3f}", row.shard) for row in shown]
    console.print(table(title, ("key", "tokens", "mean k", "logprob", "shard"), lines))


def read_wanted(cache: Container[str], path: Path) -> set[str]:
    """The keys in a file; each must be in the cache."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CachekdError("the keys cannot be read", where=str(path), found=str(error)) from None
    # Not splitlines: a key may hold U+2028.
    found = {line.removesuffix("\r") for line in text.split("\n")} - {""}
    unknown = [key for key in found if key not in cache]
    if unknown:
        raise CachekdError(
            "the cache lacks some of the keys",
            where=str(path),
            expected="keys of the cache",
            found=f"{len(unknown):,} others, such as {min(unknown)!r}",
        )
    return found
