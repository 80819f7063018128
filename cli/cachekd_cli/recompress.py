"""`cachekd recompress`: a smaller cache, without a teacher."""

from __future__ import annotations

from typing import Annotated

import typer

from cachekd_cli.console import console, print_json, progress_bar, say, table
from cachekd_cli.options import AsJson, CacheFolder, NewFolder, TopK


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
    made of the codes that are there. The new manifest says what it was made from, and how near it is to that.

    Example: cachekd recompress caches/llava-7b caches/small --top-k 16 --tail bytes=32
    """
    from cachekd.cache import Manifest
    from cachekd.cache.recompress import recompress

    old = Manifest.load(cache)
    with progress_bar("samples") as bar:
        task = bar.add_task("recompressing", total=old.samples, note="")
        new = recompress(cache, out, top_k=top_k, tail=tail, progress=lambda done: bar.advance(task, done))
    fidelity = new.lineage[-1].fidelity
    if as_json:
        print_json(
            {
                "out": out,
                "samples": new.samples,
                "tokens": new.tokens,
                "bytes": new.size,
                "sketch_bytes": new.sketch_bytes,
                "fidelity_to_parent": None if fidelity is None else fidelity.model_dump(),
            }
        )
        return
    rows = [
        (
            str(path),
            f"{of.size / of.tokens:,.1f}",
            f"{of.entries / of.tokens:,.1f}",
            f"{of.sketch_bytes / 1e6:,.2f}",
        )
        for path, of in ((cache, old), (out, new))
    ]
    console.print(table("recompressed", ("cache", "shard bytes/token", "logprobs/token", "sketch MB"), rows))
    if fidelity is not None:
        say(
            f"new against old, at {fidelity.tokens} tokens: KL {fidelity.kl:.4f} nats, "
            f"gradient cosine {fidelity.cosine:.4f}"
        )
