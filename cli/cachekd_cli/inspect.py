"""`cachekd inspect`: what is in a cache; `cachekd schema`: what its files and configurations may hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.bar import Bar as DrawnBar
from rich.markup import escape
from rich.table import Table

from cachekd.config.fields import ENTROPY_TOKENS
from cachekd.errors import CachekdError
from cachekd_cli.console import (
    console,
    print_result,
    progress_bar,
    sample_progress,
    say,
    table,
    visible,
    write_page,
)
from cachekd_cli.options import AsJson, CacheFolder
from cachekd_cli.tables import WholeWords

if TYPE_CHECKING:
    from cachekd.cache.overview import Bar
    from cachekd.cache.summary import CacheSummary, ShardSummary


SHOWN = 12  # shards
BAR_WIDTH = 32


def inspect_command(
    cache: CacheFolder,
    html: Annotated[Path | None, typer.Option(help="Write it as an HTML page with plots.")] = None,
    entropy_tokens: Annotated[
        int, typer.Option(min=1, help="With a tail sketch: tokens whose entropy is measured.")
    ] = ENTROPY_TOKENS,
    as_json: AsJson = False,
) -> None:
    """Show what is in a cache: teacher, data, bytes by part, k, entropy, accuracy, shards. Reads all of it.

    Example: cachekd inspect caches/llava-7b --html llava-7b.html
    """
    from cachekd.atomic import require_place
    from cachekd.cache.manifest import Manifest
    from cachekd.cache.summary import summarise

    if html is not None:
        require_place(html)
    manifest = Manifest.load(cache)
    with progress_bar("MB") as bar:
        advance = sample_progress(bar, "inspect", len(manifest.shards))
        summary = summarise(
            cache,
            entropy_tokens=entropy_tokens,
            progress=lambda shard: advance(1, shard.bytes / 1e6),
        )
    if html is not None:
        from cachekd.report.pages import inspect_page

        write_page(html, inspect_page(summary))
    if as_json or html is None:
        print_result(as_json, summary, print_summary)


def print_summary(summary: CacheSummary) -> None:
    """Print the summary in the terminal."""
    from cachekd.cache import overview

    manifest = summary.manifest
    facts(f"cache {summary.path}", overview.headline(summary).items())
    facts("where it comes from", overview.origin(manifest).items())
    bars("bytes in the shards", overview.part_bars(summary), summary.tokens)
    bars("k: logprobs kept per token", overview.k_bars(summary.k))
    title = f"entropy, nats ({overview.measured_at(summary.entropy, summary.tokens)})"
    bars(title, overview.entropy_bars(summary.entropy))
    console.print(shard_table(summary.shards))
    facts("fingerprints (sha256)", overview.fingerprints(manifest).items())


def facts(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names with texts, which wrap."""
    result = Table(title=escape(title), title_justify="left", show_header=False)
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows:
        result.add_row(escape(name), escape(visible(value)))
    console.print(result)


def bars(title: str, found: list[Bar], per: int | None = None) -> None:
    """Print a histogram; its last column is the share of all, or the value divided by `per` tokens."""
    result = Table(title=escape(title), title_justify="left", show_header=False, box=None, padding=(0, 1))
    result.add_column(justify="right")
    result.add_column()
    result.add_column(justify="right")
    result.add_column(justify="right")
    most, total = max((bar.value for bar in found), default=1), sum(bar.value for bar in found)
    for bar in found:
        share = f"{100 * bar.value / max(1, total):.1f} %"
        last = share if per is None else f"{bar.value / max(1, per):.2f} per token"
        drawn = DrawnBar(most, 0, bar.value, width=BAR_WIDTH, color="cyan")
        result.add_row(escape(bar.label), drawn, f"{bar.value:,}", last)
    console.print(result)


def shard_table(shards: list[ShardSummary]) -> WholeWords:
    """A table of the shards: of all if they are few, or else of the first and the last."""
    columns = ("shard", "data", "samples", "tokens", "bytes", "mean k", "top-1", "logprob", "KL")
    rows: list[tuple[Any, ...]] = [
        (
            shard.name,
            shard.source,
            f"{shard.samples:,}",
            f"{shard.tokens:,}",
            f"{shard.bytes:,}",
            f"{shard.mean_k:.1f}",
            f"{100 * shard.top1:.1f} %",
            f"{shard.logprob:.3f}",
            "" if shard.kl is None else f"{shard.kl:.3g}",
        )
        for shard in shards
    ]
    if len(rows) > SHOWN:
        between = (f"... {len(rows) - SHOWN + 1:,} more (--json has all)", *[""] * (len(columns) - 1))
        rows = [*rows[: SHOWN - 3], between, *rows[-2:]]
    return table("shards", columns, rows)


def schema_command(
    name: Annotated[str | None, typer.Argument(help="Of what; without it, all names are listed.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this file instead.")] = None,
) -> None:
    """Print the JSON Schema of a file that cachekd reads or writes.

    Example: cachekd schema manifest --out manifest.schema.json
    """
    from cachekd.atomic import write_file
    from cachekd.schemas import SCHEMAS, schema_text

    if name is None:
        for known, model in SCHEMAS.items():
            first = (model.__doc__ or "").split("\n")[0]
            say(f"{known:10}{first}")
        return
    if name not in SCHEMAS:
        raise CachekdError(f"there is no schema {name!r}", expected=f"one of {', '.join(SCHEMAS)}")
    if out is None:
        print(schema_text(name), end="")
    else:
        write_file(out, schema_text(name).encode())
