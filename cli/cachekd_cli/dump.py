"""`cachekd dump`: stage one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachekd_cli.console import console, print_json, progress_bar, quiet_libraries, sample_progress, table

if TYPE_CHECKING:
    from cachekd.config import DumpConfig
    from cachekd.dump import DumpSummary


def dump_command(
    teacher: Annotated[str, typer.Option(help="Teacher: a model folder or hub name.")],
    data: Annotated[Path, typer.Option(help="LLaVA .json/.jsonl, a WebDataset .tar, or a folder of tars.")],
    out: Annotated[Path, typer.Option(help="The cache's folder; must be new or empty.")],
    top_k: Annotated[int, typer.Option(help="Most logprobs kept per answer token.")] = 128,
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep at least this share of the mass; default 0.99 with --tail none, else 0."),
    ] = None,
    tail: Annotated[
        str | None,
        typer.Option(help="Of the logprobs that are not kept: none, bytes=64 (a token), step=0.1 or exact."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Answer tokens that the tail sketch is fitted on; default 16384.")
    ] = None,
    window: Annotated[int, typer.Option(help="Kneedle looks at this many of the largest logits.")] = 128,
    min_k: Annotated[int, typer.Option(help="Least logprobs kept per answer token.")] = 2,
    batch_size: Annotated[int, typer.Option(help="Samples per teacher forward.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run the teacher once over a data set and cache its logits at the answer tokens.

    Example: cachekd dump --teacher models/llava-7b --data data/train --out caches/llava-7b
    """
    from cachekd.config import DumpConfig, read_config

    quiet_libraries()
    config: DumpConfig = read_config(
        None,
        DumpConfig,
        {
            "teacher": teacher,
            "data": data,
            "out": out,
            "top_k": top_k,
            "top_p": top_p,
            "tail": tail,
            "calibration_tokens": calibration_tokens,
            "window": window,
            "min_k": min_k,
            "batch_size": batch_size,
            "dtype": dtype,
        },
    )
    summary = run_dump(config)
    if as_json:
        fidelity = summary.fidelity and summary.fidelity.model_dump()
        print_json({**summary.__dict__, "fidelity": fidelity, "bytes_per_token": summary.bytes_per_token})
    else:
        print_summary(summary)


def run_dump(config: DumpConfig) -> DumpSummary:
    """Dump behind a progress bar."""
    from cachekd.dump import dump
    from cachekd.samples import open_samples

    total = len(open_samples(config.data))
    with progress_bar("tokens") as bar:
        return dump(config, sample_progress(bar, "dump", total))


def print_summary(summary: DumpSummary) -> None:
    """The summary table."""
    rows = [
        ("samples", f"{summary.samples:,}"),
        ("answer tokens", f"{summary.tokens:,}"),
        ("bytes per token", f"{summary.bytes_per_token:.1f}"),
        ("mean k", f"{summary.mean_k:.1f}"),
        ("size", f"{summary.bytes / 1e6:.2f} MB"),
        *_sketch_rows(summary),
        ("wall time", f"{summary.seconds:.1f} s"),
        ("tokens/s", f"{summary.tokens / summary.seconds:,.0f}"),
    ]
    console.print(table(f"cache {summary.out}", ("", "value"), rows))


def _sketch_rows(summary: DumpSummary) -> list[tuple[str, str]]:
    fidelity = summary.fidelity
    if fidelity is None:
        return []
    return [
        ("tail sketch", f"{summary.sketch_bytes / 1e6:.2f} MB"),
        ("KL to the live teacher", f"{fidelity.kl:.4f} nats"),
        ("gradient cosine to live", f"{fidelity.cosine:.4f}"),
    ]
