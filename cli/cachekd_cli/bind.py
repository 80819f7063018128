"""`cachekd bind`: which samples of a cache a data set has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekd.config import DataOptions
from cachekd.errors import CachekdError
from cachekd.paths import PathOrName
from cachekd_cli.console import (
    console,
    print_json,
    progress_bar,
    quiet_libraries,
    sample_progress,
    say,
    table,
)
from cachekd_cli.options import AsJson, takes

if TYPE_CHECKING:
    from cachekd.cache import LogitCache
    from cachekd.check.bind import BindReport


SHOWN = 5


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

    The data may lie in another order, folder or container. Bad samples are listed, whatever --on-error says;
    how long samples are does not matter.

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
    with progress_bar("samples") as bar:
        advance = sample_progress(bar, "bind", len(samples))
        report = bind(opened, samples, workers=workers, progress=lambda done: advance(done, done))
    if out is not None:
        report.write(out, opened, data.data)
    if as_json:
        print_json(as_dict(report))
    else:
        print_report(report, cache, data.data, out)
        print_why(report, opened, data)
    if report.unbound:
        raise typer.Exit(1)


def as_dict(report: BindReport) -> dict[str, Any]:
    """Everything, for scripts."""
    return {
        "matched": report.matched,
        "moved": report.moved,
        "changed": report.changed,
        "unknown": report.unknown,
        "unreadable": report.unreadable,
        "missing": report.missing,
    }


def print_report(report: BindReport, cache: str, data: str, out: Path | None) -> None:
    """Counts with some keys of each kind, and what to do."""
    rows = [
        ("matched", report.matched, ""),
        ("matched, other key", len(report.moved), _some([f"{a} is {b}" for a, b in report.moved.items()])),
        ("changed", len(report.changed), _some(report.changed)),
        ("not in the cache", len(report.unknown), _some(report.unknown)),
        ("unreadable", len(report.unreadable), _some([f"{k}: {v}" for k, v in report.unreadable.items()])),
        ("missing in the data", len(report.missing), _some(report.missing)),
    ]
    found = table(f"{data} and {cache}", ("", "samples", "such as"), rows)
    found.columns[2].justify = "left"
    console.print(found)
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


def print_why(report: BindReport, cache: LogitCache, data: DataOptions) -> None:
    """What of the reading, and not of the data, may be why samples do not match."""
    from cachekd.models.fingerprint import reads_images_otherwise

    named = {source.data.map for source in cache.manifest.sources} - {None}
    if report.unbound and named and data.map is None:
        told = f"the cache's data were read by --map {' and '.join(map(str, named))}, these without"
        say(told)
    if report.changed and reads_images_otherwise(cache.manifest.fingerprints):
        say("some images are read in another way since that dump: dump again")


def _some(values: list[str]) -> str:
    return ", ".join(values[:SHOWN]) + (", ..." if len(values) > SHOWN else "")
