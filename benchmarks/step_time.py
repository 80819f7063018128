"""A step of stage two: time, memory and arithmetic of five ways, each in a process of its own.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --json

naive_live is Switch-KD the way anyone would first write it: two whole models, and logits of every position in
all three paths. live is `--live-teacher`, cached the ordinary way, cached_no_vsd the same without the
switched path, ce_only without any teacher. All see the same batch; the cached ones read what a dump with
`--tail bytes=64` would have kept of it. The weights are random, the teacher's head is scaled up.

A step is forward, backward, clipping, AdamW and, in ours, the Trainer's own work. The figure is the median of
`--steps` after a first one; in that, FLOPs are counted (`torch.utils.flop_counter`, forward and backward).
Memory is the process's peak beyond what it held before the models were loaded. On a CPU: of a GPU,
`benchmarks/gpu.py` measures the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from apart import apart, resident
from clock import Clock, Timed
from rich.console import Console
from rich.table import Table
from small_vlm import (
    CPU,
    MIN_K,
    WINDOW,
    Examples,
    Naive,
    Text,
    Tower,
    lean_trainer,
    random_samples,
    save_vlm,
)
from transformers.utils import logging

from cachekd.cache import CachedTargets
from cachekd.cache.sparse_logits import TailStates
from cachekd.cache.tail.encoder import OutputHead
from cachekd.cache.tail.fit import fit_sketch
from cachekd.cache.tail.setting import TailSetting
from cachekd.cache.topk import select_and_normalise
from cachekd.data import predicting_positions
from cachekd.models import LiveTeacher, ModelFiles, SwitchedTeacher, load_model
from cachekd.models.split import hidden_and_logits_at
from cachekd.train.batch import Example

VARIANTS = ("naive_live", "live", "cached", "cached_no_vsd", "ce_only")
OPINION = 20.0  # the random teacher's head is scaled by it: else all its logits are much the same


@dataclass(frozen=True)
class Sizes:
    """Of both models and the batch."""

    vocab: int
    batch: int
    length: int
    student: tuple[Tower, Text]
    teacher: tuple[Tower, Text]


# A teacher of some six times the student's cost, heads of some share of it as in Qwen2.5 0.5B and 3B.
SIZES = {
    "tiny": Sizes(
        vocab=512,
        batch=2,
        length=48,
        student=(Tower(1, 32), Text(1, 32)),
        teacher=(Tower(2, 32), Text(2, 96)),
    ),
    "cpu": Sizes(
        vocab=8_192,
        batch=4,
        length=160,
        student=(Tower(4, 192, heads=3, image=64, patch=8), Text(6, 256, heads=4, inner=2.7)),
        teacher=(Tower(8, 192, heads=3, image=64, patch=8), Text(7, 640, heads=10, inner=2.7)),
    ),
}


@torch.no_grad()
def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Both models, and what a cache would hold of the batch."""
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    sizes = SIZES[options.size]
    for seed, name in enumerate(("teacher", "student")):
        save_vlm(folder / name, sizes.vocab, *getattr(sizes, name), seed=seed)
    teacher = load_model(str(folder / "teacher"), dtype=torch.float32, device=CPU)
    teacher.lm_head.weight *= OPINION
    teacher.save_pretrained(folder / "teacher")
    data = random_samples(sizes.batch, sizes.length, sizes.vocab, sizes.teacher[0])
    kept, states = [], []
    for sample in data:
        inputs = {
            "input_ids": sample.inputs["input_ids"][None],
            "pixel_values": sample.inputs["pixel_values"],
        }
        positions = predicting_positions(sample.supervised[None])
        hidden, logits = hidden_and_logits_at(teacher, inputs, positions)
        records, normaliser = select_and_normalise(
            logits, sample.token_ids, top_k=128, top_p=0.0, window=WINDOW, min_k=MIN_K
        )
        kept.append(records)
        states.append(TailStates(hidden, normaliser))
    head = OutputHead(teacher.lm_head.weight)
    calibration = type(kept[0]).concatenate(kept), TailStates.concatenate(states)
    encoder = fit_sketch(head, calibration[1], calibration[0], TailSetting.parse("bytes=64"))
    targets = [
        CachedTargets.from_sparse(
            replace(records, sketch=encoder.encode(some)),
            vocab_size=sizes.vocab,
            window=WINDOW,
            min_k=MIN_K,
            sketch=encoder.sketch,
        )
        for records, some in zip(kept, states, strict=True)
    ]
    torch.save(targets, folder / "targets.pt")


def run_ours(name: str, folder: Path, options: argparse.Namespace, clock: Clock) -> float:
    """cachekd's trainer; the mean loss of the steps."""
    sizes, dtype = SIZES[options.size], getattr(torch, options.dtype)
    teacher = None
    if name in ("live", "cached"):
        files = ModelFiles(folder / "teacher")
        teacher = SwitchedTeacher(files.load(dtype=dtype, device=CPU, tower=name == "live"))
    data = random_samples(sizes.batch, sizes.length, sizes.vocab, sizes.student[0])
    targets: list[CachedTargets | None] = [None] * len(data)
    if name.startswith("cached"):
        targets = torch.load(folder / "targets.pt", weights_only=False)
    trainer = lean_trainer(
        load_model(str(folder / "student"), dtype=torch.float32, device=CPU),
        Examples(
            [Example(encoded, target) for encoded, target in zip(data, targets, strict=True)],
            options.steps + 1,
        ),
        folder / "out",
        batch=len(data),
        settings={
            "use_cpu": True,
            "bf16": dtype == torch.bfloat16,
            "logging_steps": options.steps + 1,
        },
        teacher=teacher,
        live=LiveTeacher(teacher, sizes.vocab) if teacher and name == "live" else None,
        weights={"align": 0.0 if name == "ce_only" else 1.0, "vsd": 1.0 if teacher else 0.0},
        callbacks=[Timed(clock)],
    )
    with profiled(options.profile):
        trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def run_naive(folder: Path, options: argparse.Namespace, clock: Clock) -> float:
    """The mean loss of the steps, as the Trainer's log has it."""
    sizes, dtype = SIZES[options.size], getattr(torch, options.dtype)
    naive = Naive(
        load_model(str(folder / "student"), dtype=torch.float32, device=CPU),
        load_model(str(folder / "teacher"), dtype=dtype, device=CPU),
        random_samples(sizes.batch, sizes.length, sizes.vocab, sizes.student[0]),
        autocast=None if dtype == torch.float32 else dtype,
    )
    clock.begin()
    losses = []
    with profiled(options.profile):
        for _ in range(options.steps + 1):
            loss = naive.loss()
            loss.backward()
            clock.before_update()
            naive.update()
            losses.append(loss.item())
            clock.end()
    return statistics.mean(losses)


@contextmanager
def profiled(wanted: bool) -> Iterator[None]:
    """Which operations take the time, on stderr."""
    if not wanted:
        yield
        return
    from torch.profiler import profile

    with profile() as profiler:
        yield
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40), file=sys.stderr)


def run_variant(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """In this process."""
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    before, clock = resident("VmRSS"), Clock(CPU)
    if name == "naive_live":
        loss = run_naive(folder, options, clock)
    else:
        loss = run_ours(name, folder, options, clock)
    return {
        "name": name,
        "step_ms": 1e3 * statistics.median(clock.wall),
        "cpu_ms": 1e3 * statistics.median(clock.cpu),
        "peak_mb": (resident("VmHWM") - before) / 1e6,
        "flops": clock.flops,
        "loss": loss,
    }


def print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Each beside naive_live, and whether the time is what the arithmetic says."""
    first, by_name = rows[0], {row["name"]: row for row in rows}
    sizes = SIZES[options.size]
    title = f"{options.dtype}: V = {sizes.vocab:,}, {sizes.batch} x {sizes.length} tokens"
    table = Table("share of naive_live", "ms a step", "CPU ms", "peak MB", "GFLOP", title=title)
    for row in rows:
        cells = [row["name"]]
        for name, scale in (("step_ms", 1), ("cpu_ms", 1), ("peak_mb", 1), ("flops", 1e9)):
            cells.append(f"{row[name] / scale:,.0f}  {row[name] / first[name]:.3f}")
        table.add_row(*cells)
    console = Console()
    console.print(table)
    cached = by_name["cached"]
    flops = cached["flops"] / first["flops"]
    for name, what in (("step_ms", "wall"), ("cpu_ms", "CPU")):
        ratio = cached[name] / first[name]
        more = f"{ratio / flops - 1:+.1%}"
        console.print(f"cached / naive_live: {what} time {ratio:.3f}, FLOPs {flops:.3f}: {more}")
    # The live teacher's forward, with its head at the answers only, beside a third of forward and backward.
    teacher, student = by_name["live"]["flops"] - cached["flops"], by_name["ce_only"]["flops"] / 3
    console.print(f"the teacher's forward is {teacher / student:.1f} times the student's")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", default="cpu", choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=5, help="timed, after a first one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which of these")
    parser.add_argument("--profile", action="store_true", help="the operations that take longest, on stderr")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        apart(prepare, Path(folder), options)
        rows = []
        for name in options.variants.split(","):
            rows.append(apart(run_variant, name, Path(folder), options))
            print(json.dumps(rows[-1]), file=sys.stderr)  # what is measured stays when a later one fails
    if options.json or options.variants != ",".join(VARIANTS):
        print(json.dumps(rows))
    else:
        print_table(rows, options)


if __name__ == "__main__":
    main()
