"""`cachekd dump`: run the teacher once, and keep what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachekd.config import DumpConfig
from cachekd_cli.console import (
    if_any,
    print_result,
    print_values,
    progress_bar,
    quiet_libraries,
    sample_progress,
    say,
)
from cachekd_cli.options import AsJson, takes
from cachekd_cli.signals import stopping_in_order

if TYPE_CHECKING:
    from cachekd.dump import DumpSummary
    from cachekd.dump.estimate import Estimate
    from cachekd.dump.run import Progress


@takes(DumpConfig, environment={"rank": "RANK", "world_size": "WORLD_SIZE"})  # of torchrun and accelerate
def dump_command(
    config: DumpConfig,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Run a few batches, say what the whole will cost, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the teacher once over a data set and cache its logits at the answer tokens.

    Repeated, the same command continues where it stopped; finished shards are not made again. Several
    processes share the work: `accelerate launch -m cachekd dump ...`, torchrun, or --rank and --world-size.

    Example: cachekd dump --teacher models/llava-7b --data data/train --out caches/llava-7b
    """
    quiet_libraries()
    if estimate:
        found = run_estimate(config)
        words = partial(print_estimate, config=config)
        print_result(
            as_json,
            found,
            words,
            lambda found: {**vars(found), "size": found.size, "tokens_per_second": found.tokens_per_second},
        )
        return
    with stopping_in_order(lambda _: how_to_go_on(config.out)):
        summary = run_dump(config)
    print_result(as_json, summary, print_summary, lambda s: {**vars(s), "bytes_per_token": s.bytes_per_token})


def run_dump(config: DumpConfig) -> DumpSummary:
    """Dump behind a progress bar; only the first of several processes shows one."""
    from cachekd.dump import dump

    with dump_bar(hidden=config.rank > 0) as show:
        return dump(config, show)


def run_estimate(config: DumpConfig) -> Estimate:
    """Run the pilot behind a progress bar."""
    from cachekd.dump import estimate_dump

    with dump_bar() as show:
        return estimate_dump(config, show)


@contextmanager
def dump_bar(hidden: bool = False) -> Iterator[Progress]:
    """A line per phase: samples, tokens a second, ETA."""
    phases: dict[str, Callable[[int, float], None]] = {}

    def show(phase: str, total: int | None, samples: int, tokens: int) -> None:
        if phase not in phases:
            for task in bar.tasks:  # an earlier phase is over
                bar.update(task.id, total=task.completed)
            phases[phase] = sample_progress(bar, phase, total)
        phases[phase](samples, tokens)

    with progress_bar("tokens", hidden=hidden) as bar:
        yield show


def how_to_go_on(out: Path) -> str:
    """Say what there is of a dump that was stopped."""
    from cachekd.cache.build import dump_status
    from cachekd.cache.layout import PLAN_FILE

    if not (out / PLAN_FILE).exists():
        return "stopped before anything was written"
    status = dump_status(out)
    return (
        f"stopped: {status.shards:,} of {status.all_shards:,} shards are finished and stay, the one that was "
        "being made is discarded. Run the same command again to go on."
    )


def print_summary(summary: DumpSummary) -> None:
    """Print what the cache holds, and how long it took."""
    from cachekd.cache.overview import bytes_per_token

    fidelity = summary.fidelity
    values = {
        "shards": f"{summary.shards:,} of {summary.all_shards:,}",
        "samples": f"{summary.samples:,}",
        "of them without an image": f"{summary.without_image:,}",
        "of them cut": if_any(summary.cut),
        "left out (skipped.jsonl)": if_any(summary.skipped),
        "keys that came before": if_any(summary.repeated_keys),
        "files that are no data": if_any(summary.other_files),
        "answer tokens": f"{summary.tokens:,}",
        "bytes per token": bytes_per_token(summary.bytes, summary.sketch_bytes, summary.tokens),
        "shards in smaller batches, as memory ran out": if_any(summary.halved),
        "mean k": f"{summary.mean_k:.1f}",
        "size": f"{summary.bytes / 1e6:.2f} MB",
        "tail sketch": fidelity and f"{summary.sketch_bytes / 1e6:.2f} MB",
        "vocabulary": if_any(summary.vocabulary_bytes / 1e6, "{:.2f} MB"),
        "KL to the live teacher": fidelity and f"{fidelity.kl:.4f} nats",
        "gradient cosine to live": fidelity and f"{fidelity.cosine:.4f}",
        "wall time of this run": f"{summary.seconds:.1f} s",
        "tokens/s of this run": f"{summary.new_tokens / max(1e-9, summary.seconds):,.0f}",
    }
    print_values(f"cache {summary.out}", values)
    if not summary.finished:
        say(
            f"{summary.all_shards - summary.shards} shards are still to come from other processes. "
            "If they have died, run the same command again: it goes on where they stopped."
        )


def print_estimate(found: Estimate, config: DumpConfig) -> None:
    """Print what the whole dump will cost."""
    from cachekd.cache.overview import bytes_per_token

    hours = found.seconds / config.world_size / 3600
    values = {
        "samples": f"{found.samples:,}",
        "answer tokens": f"{found.tokens:,} ± {found.tokens_error:,}",
        "top-k, tail": f"{found.codec.top_k}, {found.codec.tail}",
        "bytes per token": bytes_per_token(found.shard_bytes, found.sketch_bytes, found.tokens),
        "shards": f"{found.shard_bytes / 1e6:,.2f} MB",
        "tail sketch": f"{found.sketch_bytes / 1e6:,.2f} MB",
        "vocabulary": f"{found.vocabulary_bytes / 1e6:,.2f} MB",
        "cache in all": f"{found.size / 1e6:,.2f} MB",
        "teacher forwards": f"{found.forwards:,}, {found.limits}",
        "answer tokens/s": f"{found.tokens_per_second:,.0f} in one process",
        "time": f"{hours:,.2f} h" if hours >= 0.1 else f"{hours * 3600:,.0f} s",
        "peak memory": f"{found.peak_memory / 2**30:,.2f} GiB",
    }
    print_values(f"estimate for {config.data}", values)
