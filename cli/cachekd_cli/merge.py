"""`cachekd merge`: several caches of one teacher as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachekd_cli.console import print_json, say
from cachekd_cli.options import AsJson


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
    if as_json:
        print_json(
            {"out": out, "samples": manifest.samples, "tokens": manifest.tokens, "bytes": manifest.size}
        )
    else:
        say(
            f"{out}: {manifest.samples:,} samples, {manifest.tokens:,} answer tokens, "
            f"{len(manifest.shards):,} shards from {len(caches)} caches"
        )
