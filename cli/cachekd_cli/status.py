"""`cachekd status`: how far a dump is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachekd_cli.console import console, print_json, say, table
from cachekd_cli.options import AsJson


def status_command(
    cache: Annotated[Path, typer.Argument(help="The folder of a cache or of a dump under way.")],
    as_json: AsJson = False,
) -> None:
    """Show how much of a dump is done, while it runs or after it was stopped.

    Example: cachekd status caches/llava-7b
    """
    from cachekd.cache.build import dump_status

    status = dump_status(cache)
    if as_json:
        print_json(status.__dict__)
        return
    share = 100 * status.shards / max(1, status.all_shards)
    rows = [
        ("shards", f"{status.shards:,} of {status.all_shards:,} ({share:.0f} %)"),
        ("samples", f"{status.samples:,} of {status.all_samples:,}"),
        ("left out", f"{status.skipped:,}"),
        ("answer tokens", f"{status.tokens:,}"),
        ("size", f"{status.bytes / 1e6:,.2f} MB"),
        ("teacher", status.teacher),
        ("data", status.data),
    ]
    console.print(table(f"{'cache' if status.finished else 'dump'} {cache}", ("", "value"), rows))
    if not status.finished:
        say("not finished: the same `cachekd dump` goes on with it")
