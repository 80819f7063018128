"""`cachekd export`: a cache in a form that other trainers read."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from cachekd.config import DataOptions
from cachekd.errors import CachekdError
from cachekd_cli.console import print_json, progress_bar, say
from cachekd_cli.options import AsJson, Binding, CacheFolder, NewFolder, TopK, takes


class Form(StrEnum):
    """What to write."""

    parquet = "parquet"
    webdataset = "webdataset"


@takes(DataOptions)
def export_command(
    cache: CacheFolder,
    out: NewFolder,
    to: Annotated[Form, typer.Option(help="Top-k lists as a table, or tars with samples and targets.")],
    data: DataOptions | None,
    top_k: TopK = None,
    binding: Binding = None,
    as_json: AsJson = False,
) -> None:
    """Write a cache's logprobs for trainers other than cachekd.

    Exported is what is kept exactly, and the mass of the rest; the tail sketch is not. What is not said of
    the data is as in the dump; every sample of the cache has to be there, whatever --on-error says.

    Example: cachekd export caches/llava-7b out/tars --to webdataset --data data/train
    """
    from cachekd.check.bind import open_bound
    from cachekd.check.data import as_dumped
    from cachekd.data import open_samples
    from cachekd.export import export_parquet, export_webdataset

    if (data is None) == (to is Form.webdataset):
        raise CachekdError(
            "--data goes with --to webdataset, and only with it",
            found=f"--to {to.value} {'without' if data is None else 'with'} --data",
            fix="tars hold the samples themselves; a parquet file has their keys and content hashes",
        )
    opened = open_bound(cache, binding)
    with progress_bar("samples") as bar:
        task = bar.add_task("exporting", total=opened.manifest.samples, note="")

        def advance(done: int) -> None:
            bar.advance(task, done)

        if data is None:
            written = export_parquet(opened, out, top_k=top_k, progress=advance)
        else:
            dumped = opened.manifest.sources[0].data
            samples = open_samples(as_dumped(data, dumped, str(cache), bound=binding is not None))
            written = export_webdataset(opened, out, samples, top_k=top_k, progress=advance)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if as_json:
        print_json({"out": out, "samples": written, "bytes": size})
    else:
        say(f"{out}: {written:,} samples, {size / 1e6:,.2f} MB")
