"""`cachekd dump`: run the teacher once, and keep what it says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TaskID

from cachekd.config import DumpConfig
from cachekd_cli.console import console, errors, print_json, progress_bar, quiet_libraries, say, table
from cachekd_cli.options import AsJson, takes
from cachekd_cli.signals import exit_code

if TYPE_CHECKING:
    from cachekd.dump import DumpSummary
    from cachekd.dump.estimate import Estimate


@takes(DumpConfig, environment={"rank": "RANK", "world_size": "WORLD_SIZE"})  # of torchrun and accelerate
def dump_command(
    config: DumpConfig,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Run a few batches, say what the whole will cost, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the teacher once over a data set and cache its logits at the answer tokens.

    The same command again goes on where it stopped; nothing that is finished is made twice. Several processes
    share the work: `accelerate launch -m cachekd_cli dump ...`, torchrun, or --rank and --world-size.

    Example: cachekd dump --teacher models/llava-7b --data data/train --out caches/llava-7b
    """
    quiet_libraries()
    if estimate:
        found = run_estimate(config)
        if as_json:
            print_json({**found.__dict__, "codec": found.codec.model_dump(), "size": found.size})
        else:
            print_estimate(found, config)
        return
    try:
        summary = run_dump(config)
    except KeyboardInterrupt as stop:
        print_stopped(config.out)
        raise typer.Exit(exit_code(stop)) from None
    if as_json:
        fidelity = summary.fidelity and summary.fidelity.model_dump()
        print_json({**summary.__dict__, "fidelity": fidelity, "bytes_per_token": summary.bytes_per_token})
    else:
        print_summary(summary)


def run_dump(config: DumpConfig) -> DumpSummary:
    """Dump behind a progress bar; only the first of several processes shows one."""
    from cachekd.dump import dump

    with DumpBar(hidden=config.rank > 0) as bar:
        return dump(config, bar)


def run_estimate(config: DumpConfig) -> Estimate:
    """Run the pilot behind a progress bar."""
    from cachekd.dump import estimate_dump

    with DumpBar() as bar:
        return estimate_dump(config, bar)


class DumpBar:
    """A line per phase: samples, tokens a second, ETA."""

    def __init__(self, hidden: bool = False) -> None:
        self.bar = progress_bar("tokens")
        self.bar.disable = hidden
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> DumpBar:
        self.bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.bar.stop()

    def __call__(self, phase: str, total: int | None, samples: int, tokens: int) -> None:
        """Show progress, as `cachekd.dump.run.Progress` tells it."""
        if phase not in self.tasks:
            for task in self.tasks.values():  # an earlier phase is over
                self.bar.update(task, total=self.bar.tasks[task].completed)
            self.tasks[phase] = self.bar.add_task(phase, total=total, units=0, note="")
        task = self.tasks[phase]
        self.bar.update(task, advance=samples, units=self.bar.tasks[task].fields["units"] + tokens)


def print_stopped(out: Path) -> None:
    """Say what there is, and how to go on."""
    from cachekd.cache.build import dump_status
    from cachekd.cache.layout import PLAN_FILE

    if not (out / PLAN_FILE).exists():
        say("stopped before anything was written", errors)
        return
    status = dump_status(out)
    say(
        f"stopped: {status.shards:,} of {status.all_shards:,} shards are finished and stay, the one that was "
        "being made is discarded. Run the same command again to go on.",
        errors,
    )


def print_summary(summary: DumpSummary) -> None:
    """Print what the cache holds, and how long it took."""
    from cachekd.cache.overview import bytes_per_token

    rows = [
        ("shards", f"{summary.shards:,} of {summary.all_shards:,}"),
        ("samples", f"{summary.samples:,}"),
        ("of them without an image", f"{summary.without_image:,}"),
        *([("of them cut", f"{summary.cut:,}")] if summary.cut else []),
        *([("left out (skipped.jsonl)", f"{summary.skipped:,}")] if summary.skipped else []),
        *([("keys that came before", f"{summary.repeated_keys:,}")] if summary.repeated_keys else []),
        *([("files that are no data", f"{summary.other_files:,}")] if summary.other_files else []),
        ("answer tokens", f"{summary.tokens:,}"),
        ("bytes per token", bytes_per_token(summary.bytes, summary.sketch_bytes, summary.tokens)),
        ("mean k", f"{summary.mean_k:.1f}"),
        ("size", f"{summary.bytes / 1e6:.2f} MB"),
        *_sketch_rows(summary),
        ("wall time of this run", f"{summary.seconds:.1f} s"),
        ("tokens/s of this run", f"{summary.new_tokens / max(1e-9, summary.seconds):,.0f}"),
    ]
    console.print(table(f"cache {summary.out}", ("", "value"), rows))
    if not summary.finished:
        say(
            f"{summary.all_shards - summary.shards} shards are still to come from other processes. "
            "If they have died, run the same command again: it goes on where they stopped."
        )


def print_estimate(found: Estimate, config: DumpConfig) -> None:
    """Print what the whole dump will cost."""
    from cachekd.cache.overview import bytes_per_token

    hours = found.seconds / config.world_size / 3600
    rows = [
        ("samples", f"{found.samples:,}"),
        ("answer tokens", f"{found.tokens:,} ± {found.tokens_error:,}"),
        ("top-k, tail", f"{found.codec.top_k}, {found.codec.tail}"),
        ("bytes per token", bytes_per_token(found.shard_bytes, found.sketch_bytes, found.tokens)),
        ("shards", f"{found.shard_bytes / 1e6:,.2f} MB"),
        ("tail sketch", f"{found.sketch_bytes / 1e6:,.2f} MB"),
        ("cache in all", f"{found.size / 1e6:,.2f} MB"),
        ("time", f"{hours:,.2f} h" if hours >= 0.1 else f"{hours * 3600:,.0f} s"),
        ("peak memory", f"{found.peak_memory / 2**30:,.2f} GiB"),
    ]
    console.print(table(f"estimate for {config.data}", ("", "value"), rows))


def _sketch_rows(summary: DumpSummary) -> list[tuple[str, str]]:
    fidelity = summary.fidelity
    if fidelity is None:
        return []
    return [
        ("tail sketch", f"{summary.sketch_bytes / 1e6:.2f} MB"),
        ("KL to the live teacher", f"{fidelity.kl:.4f} nats"),
        ("gradient cosine to live", f"{fidelity.cosine:.4f}"),
    ]
