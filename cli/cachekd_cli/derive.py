"""Other caches out of one, `cachekd select`, `merge`, `recompress`; and other formats, `cachekd export`."""

from __future__ import annotations

import sys
from collections.abc import Container, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cachekd.config import DataOptions
from cachekd.errors import CachekdError
from cachekd_cli.console import console, counting_samples, print_json_list, print_result, say, table
from cachekd_cli.options import AsJson, Binding, CacheFolder, NewFolder, TopK, takes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cachekd.cache import LogitCache, Manifest
    from cachekd.cache.manifest import Fidelity


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

    logprob is the teacher's mean log-probability of a sample's answer tokens. If it is very negative, the
    teacher would have answered something else.

    Example: cachekd select caches/all -o caches/sure --filter "logprob > -2 and tokens >= 3"
    """
    from cachekd.cache import LogitCache
    from cachekd.cache.subset import choose_samples, select_chosen

    if show == (out is not None):
        raise CachekdError(
            "--out and --list are one or the other",
            found="both" if show else "neither",
            fix="pass --out to make a cache, or --list to look only",
        )
    opened = LogitCache(cache)
    wanted = None if keys is None else read_wanted(opened, keys)
    chosen = choose_samples(opened, wanted, match, filter_)
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
    text = f"{manifest.samples:,} of {len(opened):,} samples, {manifest.tokens:,} answer tokens"
    print_result(as_json, totals(out, manifest), lambda _: say(f"{out}: {text}"))


def print_samples(cache: LogitCache, chosen: Sequence[NDArray[np.bool_]], as_json: bool) -> None:
    """Print samples: all of them as JSON, or the first ones as a table."""
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
    """Read the keys in a file, each of which must be in the cache.

    Raises:
        CachekdError: the file cannot be read, or the cache lacks one.
    """
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


def totals(out: Path, manifest: Manifest) -> dict[str, Any]:
    """What scripts get of a new cache."""
    return {"out": out, "samples": manifest.samples, "tokens": manifest.tokens, "bytes": manifest.size}


def merge_command(
    caches: Annotated[list[Path], typer.Argument(help="Two or more caches.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new cache's folder.")],
    as_json: AsJson = False,
) -> None:
    """Join caches of the same teacher, inputs and settings; no shard is rewritten.

    Files are hard links where the file system allows it, so that this costs no space.

    Example: cachekd merge caches/part-a caches/part-b -o caches/all
    """
    from cachekd.cache.derive import merge_caches

    manifest = merge_caches(caches, out)
    text = (
        f"{out}: {manifest.samples:,} samples, {manifest.tokens:,} answer tokens, "
        f"{len(manifest.shards):,} shards from {len(caches)} caches"
    )
    print_result(as_json, totals(out, manifest), lambda _: say(text))


def recompress_command(
    cache: CacheFolder,
    out: NewFolder,
    top_k: TopK = None,
    tail: Annotated[
        str | None, typer.Option(help="A coarser tail: none, bytes=32 or step=0.3. Default: as it is.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a smaller cache from a larger one; the teacher is not needed.

    Ids and logprobs that stay are, code for code, those of a dump with the smaller --top-k. A coarser tail is
    made of the existing codes. The new manifest names the old cache, and says how near the new one is to it.

    Example: cachekd recompress caches/llava-7b caches/small --top-k 16 --tail bytes=32
    """
    from cachekd.cache import Manifest
    from cachekd.cache.recompress import recompress

    old = Manifest.load(cache)
    with counting_samples("recompressing", old.samples) as advance:
        new = recompress(cache, out, top_k=top_k, tail=tail, progress=advance)
    fidelity = new.lineage[-1].fidelity
    result = totals(out, new) | {"sketch_bytes": new.sketch_bytes, "fidelity_to_parent": fidelity}
    print_result(as_json, result, lambda _: print_recompressed({cache: old, out: new}, fidelity))


def print_recompressed(caches: dict[Path, Manifest], fidelity: Fidelity | None) -> None:
    """Print the old cache's sizes and the new one's, and how near they are."""
    from cachekd.cache.overview import nearness

    rows = [
        (
            str(path),
            f"{of.size / of.tokens:,.1f}",
            f"{of.entries / of.tokens:,.1f}",
            f"{of.sketch_bytes / 1e6:,.2f}",
        )
        for path, of in caches.items()
    ]
    console.print(table("recompressed", ("cache", "shard bytes/token", "logprobs/token", "sketch MB"), rows))
    if fidelity is not None:
        say(f"new against old, at {fidelity.tokens:,} tokens: {nearness(fidelity)}")


@takes(DataOptions)
def export_command(
    cache: CacheFolder,
    out: NewFolder,
    to: Annotated[
        Literal["parquet", "webdataset"],
        typer.Option(help="Top-k lists as a table, or tars with samples and targets."),
    ],
    data: DataOptions | None,
    top_k: TopK = None,
    binding: Binding = None,
    as_json: AsJson = False,
) -> None:
    """Write a cache's logprobs for trainers other than cachekd.

    The logprobs that the cache keeps exactly are exported, with the probability mass of the rest, but not the
    tail sketch. Data options that you leave out are those of the dump. Every sample of the cache has to be in
    the data, whatever --on-error says.

    Example: cachekd export caches/llava-7b out/tars --to webdataset --data data/train
    """
    from cachekd.check.bind import open_bound
    from cachekd.check.data import as_dumped
    from cachekd.data import open_samples
    from cachekd.export import export_parquet, export_webdataset

    if (data is None) == (to == "webdataset"):
        raise CachekdError(
            "--data goes with --to webdataset, and only with it",
            found=f"--to {to} {'without' if data is None else 'with'} --data",
            fix="tars hold the samples themselves; a parquet file has their keys and content hashes",
        )
    opened = open_bound(cache, binding)
    with counting_samples("exporting", opened.manifest.samples) as advance:
        if data is None:
            written = export_parquet(opened, out, top_k=top_k, progress=advance)
        else:
            samples = open_samples(as_dumped(data, opened, bound=binding is not None))
            written = export_webdataset(opened, out, samples, top_k=top_k, progress=advance)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    result = {"out": out, "samples": written, "bytes": size}
    print_result(as_json, result, lambda _: say(f"{out}: {written:,} samples, {size / 1e6:,.2f} MB"))
