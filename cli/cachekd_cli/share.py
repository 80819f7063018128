"""`cachekd push`, `pull` and `bind`: a cache for others, and a cache of others for the data at hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekd.config import DataOptions
from cachekd.config.fields import STORE_TIMEOUT
from cachekd.errors import CachekdError
from cachekd.paths import PathOrName
from cachekd_cli.console import (
    SHOWN,
    console,
    counting_bytes,
    counting_samples,
    print_result,
    quiet_hub,
    quiet_libraries,
    say,
    table,
)
from cachekd_cli.options import AsJson, CacheFolder, Timeout, takes
from cachekd_cli.signals import stopping_in_order

if TYPE_CHECKING:
    from cachekd.cache import LogitCache
    from cachekd.check.bind import BindReport
    from cachekd.hub.pull import Pulled
    from cachekd.hub.push import Pushed


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

    To continue an upload that was cut short, repeat its command. Nothing is overwritten.

    A name that begins like a path on this disk is a path. So if there is a folder my-org, write
    hf://datasets/my-org/name for the hub's my-org/name.

    Example: cachekd push caches/llava-7b my-org/llava-7b-logits --license cc-by-4.0
    """
    from cachekd.cache import Manifest
    from cachekd.hub import push_cache

    quiet_hub()
    size = sum(file.bytes for file in Manifest.load(cache).files)
    three_times = counting_bytes("push", 3 * size)  # verified, uploaded, compared
    with stopping_in_order(), three_times as (advance, _):
        pushed = push_cache(
            cache, to, license=license, private=private, revision=revision, timeout=timeout, progress=advance
        )
    print_result(as_json, pushed, partial(print_pushed, licensed=license is not None))


def print_pushed(pushed: Pushed, licensed: bool) -> None:
    """Print what was sent, and where it is now."""
    say(
        f"{pushed.url}: {pushed.uploaded:,} files uploaded ({pushed.bytes / 1e6:,.2f} MB), "
        f"{pushed.skipped:,} were there already"
    )
    if pushed.kept_card:
        say("a README.md was there, and was kept as it is")
    elif not licensed:
        say("the card says that the licence is unknown: nobody may rely on it")
    say(f"next: cachekd pull {pushed.url} <folder>")


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

    To continue a download that was cut short, repeat its command. Nothing is overwritten.

    A name that begins like a path on this disk is a path. So if there is a folder my-org, write
    hf://datasets/my-org/name for the hub's my-org/name.

    Example: cachekd pull my-org/llava-7b-logits caches/llava-7b --shards 0-9
    """
    from cachekd.hub import pull_cache

    quiet_hub()
    with stopping_in_order(), counting_bytes("pull") as (advance, set_total):
        pulled = pull_cache(
            source, out, shards=shards, revision=revision, timeout=timeout, progress=advance, total=set_total
        )
    print_result(as_json, pulled, print_pulled, pulled_as_dict)


def pulled_as_dict(pulled: Pulled) -> dict[str, Any]:
    """What scripts get."""
    manifest = pulled.manifest
    return {
        "out": pulled.out,
        "fetched": pulled.fetched,
        "kept": pulled.kept,
        "fetched_bytes": pulled.bytes,
        "shards": len(manifest.shards),
        "samples": manifest.samples,
        "tokens": manifest.tokens,
        "bytes": manifest.size,
    }


def print_pulled(pulled: Pulled) -> None:
    """Print what is there now, and what of it was fetched."""
    out, manifest = pulled.out, pulled.manifest
    say(
        f"{out}: {len(manifest.shards):,} shards, {manifest.samples:,} samples, {manifest.tokens:,} answer "
        f"tokens; {pulled.fetched:,} files fetched ({pulled.bytes / 1e6:,.2f} MB), {pulled.kept:,} were here"
    )
    say(f"next: cachekd bind {out} --data <your copy of the data>")


@takes(DataOptions)
def bind_command(
    cache: Annotated[
        PathOrName, typer.Argument(help="The cache: a folder, or the address of a published one.")
    ],
    data: DataOptions,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the binding, for train, peek, verify and export."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find a cache's samples in a data set, by key and by content (messages and pixels).

    The data may be in another order, folder or container. Bad samples are listed, whatever --on-error says.
    The length of samples does not matter.

    Exit code 0 if the cache has every sample of the data set (it may have more), 1 if some are changed,
    unknown or unreadable.

    Example: cachekd bind caches/llava-7b --data "my-copy/*.tar" --out binding.json
    """
    from cachekd.atomic import require_place
    from cachekd.check.bind import bind, open_bound
    from cachekd.data import open_samples

    quiet_libraries()
    if out is not None:
        require_place(out)
        if out.exists():
            raise CachekdError(
                "the file for the binding exists already", where=str(out), fix="choose another --out"
            )
    opened, samples = open_bound(cache), open_samples(data)
    with counting_samples("bind", len(samples)) as advance:
        report = bind(opened, samples, workers=workers, progress=advance)
    if out is not None:
        report.write(out, opened, data.data)
    print_result(as_json, report, lambda report: print_report(report, opened, cache, data, out))
    if report.unbound:
        raise typer.Exit(1)


def print_report(
    report: BindReport, opened: LogitCache, cache: str, data: DataOptions, out: Path | None
) -> None:
    """Print counts, some keys of each kind, and what to do."""
    kinds = {
        "matched, other key": [f"{data_key} is {key}" for data_key, key in report.moved.items()],
        "changed": report.changed,
        "not in the cache": report.unknown,
        "unreadable": [f"{key}: {reason}" for key, reason in report.unreadable.items()],
        "missing in the data": report.missing,
    }
    rows = [
        ("matched", report.matched, ""),
        *((kind, len(keys), _some(keys)) for kind, keys in kinds.items()),
    ]
    columns = ("", "samples", "such as")
    console.print(table(f"{data.data} and {cache}", columns, rows, texts=len(columns)))
    if report.changed:
        say("changed: other text, or other pixels, such as those of an image that was encoded again")
    if report.unbound:
        say(
            f"{len(report.unbound):,} samples of the data cannot be aligned with this cache; with the "
            "binding, --missing skip leaves them out, --missing ce-only trains them by L_CE alone"
        )
    if out is not None:
        say(f"next: cachekd train --binding {out} ...")
    elif report.moved or report.unbound:
        say("next: the same with --out binding.json, for `cachekd train --binding`")
    print_why(report, opened, data)


def print_why(report: BindReport, cache: LogitCache, data: DataOptions) -> None:
    """Say whether samples may not match because they are read otherwise, and not because the data differ."""
    from cachekd.models.fingerprint import reads_images_otherwise

    named = {source.data.map for source in cache.manifest.sources} - {None}
    if report.unbound and named and data.map is None:
        say(f"the cache's data were read by --map {' and '.join(map(str, named))}, these without")
    if report.changed and reads_images_otherwise(cache.manifest.fingerprints):
        say("some images are read in another way since that dump: dump again")


def _some(values: list[str]) -> str:
    return ", ".join(values[:SHOWN]) + (", ..." if len(values) > SHOWN else "")
