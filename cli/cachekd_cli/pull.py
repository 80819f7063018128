"""`cachekd pull`: fetch a published cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachekd.config.fields import STORE_TIMEOUT
from cachekd.paths import PathOrName
from cachekd_cli.console import byte_progress, print_json, progress_bar, quiet_hub, say
from cachekd_cli.options import AsJson, Timeout
from cachekd_cli.signals import resumable


def pull_command(
    source: Annotated[
        PathOrName, typer.Argument(help="org/name on the hub, a URL such as s3://..., or a folder.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder, or one of a pull that was cut short.")],
    shards: Annotated[
        str | None, typer.Option(help="Only these, by place in the manifest: 0-9 or 0-3,7.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")] = None,
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Download a cache, or some of its shards as a cache of their own; every file is verified.

    A download that was cut short goes on when its command is repeated. Nothing is overwritten.

    What begins as a path on this disk is one: beside a folder my-org, the hub's my-org/name has to be written
    hf://datasets/my-org/name.

    Example: cachekd pull my-org/llava-7b-logits caches/llava-7b --shards 0-9
    """
    from cachekd.hub import pull_cache

    quiet_hub()
    with resumable(), progress_bar("MB") as bar:
        advance, set_total = byte_progress(bar, "pull")
        pulled = pull_cache(
            source, out, shards=shards, revision=revision, timeout=timeout, progress=advance, total=set_total
        )
    manifest = pulled.manifest
    if as_json:
        print_json(
            {
                "out": pulled.out,
                "fetched": pulled.fetched,
                "kept": pulled.kept,
                "fetched_bytes": pulled.bytes,
                "shards": len(manifest.shards),
                "samples": manifest.samples,
                "tokens": manifest.tokens,
                "bytes": manifest.size,
            }
        )
        return
    say(
        f"{out}: {len(manifest.shards):,} shards, {manifest.samples:,} samples, {manifest.tokens:,} answer "
        f"tokens; {pulled.fetched:,} files fetched ({pulled.bytes / 1e6:,.2f} MB), {pulled.kept:,} were here"
    )
    say(f"next: cachekd bind {out} --data <your copy of the data>")
