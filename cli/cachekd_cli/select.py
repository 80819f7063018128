"""`cachekd select`: some samples of a cache as a cache of their own."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any

import typer

from cachekd.errors import CachekdError
from cachekd_cli.console import console, print_json, table

SHOWN = 20


def select_command(
    cache: Annotated[Path, typer.Argument(help="The cache's folder.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The new cache's folder.")] = None,
    keys: Annotated[Path | None, typer.Option(help="A file with a key per line; '-': stdin.")] = None,
    match: Annotated[str | None, typer.Option(help="Keys of this pattern, such as 'coco/*'.")] = None,
    filter_: Annotated[
        str | None,
        typer.Option("--filter", help="A condition on key, tokens, mean_k, logprob and shard; see --list."),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the samples; make nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Derive a smaller cache; every value in it is as it was. Conditions are combined: all must hold.

    logprob is the teacher's of the answer tokens, mean per sample: very negative means that the teacher would
    have answered something else.

    Example: cachekd select caches/all -o caches/sure --filter "logprob > -2 and tokens >= 3"
    """
    from cachekd.cache import LogitCache
    from cachekd.cache.subset import filter_keys, sample_table, select_samples

    if show == (out is not None):
        raise CachekdError(
            "--out and --list are one or the other",
            found="both" if show else "neither",
            fix="pass --out to make a cache, or --list to look only",
        )
    opened = LogitCache(cache)
    rows = sample_table(opened) if show or filter_ is not None else None
    wanted = read_wanted(opened, keys) if keys is not None else set(opened)
    if match is not None:
        wanted &= set(fnmatch.filter(opened, match))
    if filter_ is not None:
        wanted &= set(filter_keys(rows, filter_))
    if out is None:
        print_samples(cache, rows[rows["key"].isin(wanted)], as_json)  # type: ignore[index]  # made, as checked
        return
    if len(wanted) == len(opened):
        raise CachekdError(
            "nothing is left out",
            where=str(cache),
            fix="pass --keys, --match or --filter, or copy the folder",
        )
    manifest = select_samples(cache, out, wanted)
    if as_json:
        print_json(
            {"out": out, "samples": manifest.samples, "tokens": manifest.tokens, "bytes": manifest.size}
        )
    else:
        console.print(
            f"{out}: {manifest.samples:,} of {len(opened):,} samples, {manifest.tokens:,} answer tokens",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def print_samples(cache: Path, rows: Any, as_json: bool) -> None:
    """Show rows of `sample_table`; all of them as JSON, the first ones as a table."""
    if as_json:
        print_json(rows.to_dict("records"))
        return
    title = f"{len(rows):,} samples of {cache}" + (f", the first {SHOWN}" if len(rows) > SHOWN else "")
    shown = rows.head(SHOWN).itertuples(index=False)
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
