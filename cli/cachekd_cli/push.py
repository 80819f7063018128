"""`cachekd push`: publish a cache."""

from __future__ import annotations

from typing import Annotated

import typer

from cachekd.config.fields import STORE_TIMEOUT
from cachekd.paths import PathOrName
from cachekd_cli.console import byte_progress, print_json, progress_bar, quiet_hub, say
from cachekd_cli.options import AsJson, CacheFolder, Timeout
from cachekd_cli.signals import resumable


def push_command(
    cache: CacheFolder,
    to: Annotated[
        PathOrName, typer.Argument(help="org/name on the hub, a URL such as s3://..., or a folder: ./name.")
    ],
    license: Annotated[
        str | None, typer.Option(help="As the hub names it: apache-2.0, cc-by-4.0, ... Default: unknown.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch of the repository. Default: main.")] = None,
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Upload a cache with a data set card; the manifest goes last, so that a part is never taken for a cache.

    An upload that was cut short goes on when its command is repeated. Nothing is overwritten.

    What begins as a path on this disk is one: beside a folder my-org, the hub's my-org/name has to be written
    hf://datasets/my-org/name.

    Example: cachekd push caches/llava-7b my-org/llava-7b-logits --license cc-by-4.0
    """
    from cachekd.cache import Manifest
    from cachekd.hub import push_cache
    from cachekd.hub.transfer import listed_files

    quiet_hub()
    size = sum(file.bytes for file in listed_files(Manifest.load(cache)))
    with resumable(), progress_bar("MB") as bar:
        advance, set_total = byte_progress(bar, "push")
        set_total(3 * size)  # verified, uploaded, compared
        pushed = push_cache(
            cache, to, license=license, private=private, revision=revision, timeout=timeout, progress=advance
        )
    if as_json:
        print_json(pushed.__dict__)
        return
    say(
        f"{pushed.url}: {pushed.uploaded:,} files uploaded ({pushed.bytes / 1e6:,.2f} MB), "
        f"{pushed.skipped:,} were there already"
    )
    if pushed.kept_card:
        say("a README.md was there, and was kept as it is")
    elif license is None:
        say("the card says that the licence is unknown: nobody may rely on it")
    say(f"next: cachekd pull {pushed.url} <folder>")
