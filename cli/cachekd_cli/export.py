"""`cachekd export`: a cache in a form that other trainers read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cachekd.errors import CachekdError
from cachekd_cli.console import console, print_json, progress_bar
from cachekd_cli.data_options import Given, read_optional, takes_data


class Form(StrEnum):
    """What to write."""

    parquet = "parquet"
    webdataset = "webdataset"


@takes_data(required=False)
def export_command(
    cache: Annotated[Path, typer.Argument(help="The cache's folder.")],
    out: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    to: Annotated[Form, typer.Option(help="Top-k lists as a table, or tars with samples and targets.")],
    data: Given,
    top_k: Annotated[
        int | None, typer.Option(help="Most logprobs per token. Default: all that are kept.")
    ] = None,
    binding: Annotated[
        Path | None, typer.Option(help="What `cachekd bind` wrote, where the data have other keys.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a cache's logprobs for trainers other than cachekd.

    Exported is what is kept exactly, and the mass of the rest; the tail sketch is not. What is not said of
    the data is as in the dump; every sample of the cache has to be there, whatever --on-error says.

    Example: cachekd export caches/llava-7b out/tars --to webdataset --data data/train
    """
    from cachekd.bind import open_bound
    from cachekd.export import export_parquet, export_webdataset
    from cachekd.samples import open_samples
    from cachekd.samples.dumped import as_dumped

    said = read_optional(data)
    if (said is None) == (to is Form.webdataset):
        raise CachekdError(
            "--data goes with --to webdataset, and only with it",
            found=f"--to {to.value} {'with' if 'data' in data else 'without'} --data",
            fix="tars hold the samples themselves; a parquet file has their keys and content hashes",
        )
    opened = open_bound(cache, binding)
    with progress_bar("samples") as bar:
        task = bar.add_task("exporting", total=opened.manifest.samples, note="")

        def advance(done: int) -> None:
            bar.advance(task, done)

        if said is None:
            written = export_parquet(opened, out, top_k=top_k, progress=advance)
        else:
            dumped = opened.manifest.sources[0].data
            samples = open_samples(as_dumped(said, dumped, str(cache), bound=binding is not None))
            written = export_webdataset(opened, out, samples, top_k=top_k, progress=advance)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if as_json:
        print_json({"out": out, "samples": written, "bytes": size})
    else:
        console.print(
            f"{out}: {written:,} samples, {size / 1e6:,.2f} MB", markup=False, highlight=False, soft_wrap=True
        )
