"""Peak memory of stage two against the naive way: two whole models, logits of every position.

    python benchmarks/train_memory.py
    python benchmarks/train_memory.py --batch 8 --length 256 --json

The vocabulary is Qwen's, the layers are small: what is measured is what grows with the vocabulary. Each
variant runs two optimizer steps in a process of its own, on a CPU; the figure is the process's peak resident
memory beyond what it held before the models were loaded. All see the same batch. The live variant says the
naive one's loss; the cached ones differ by what a cache of 64 logprobs without a sketch leaves out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from apart import apart, resident
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
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging

from cachekd.cache import CachedTargets
from cachekd.cache.topk import select_topk
from cachekd.data import Encoded, predicting_positions
from cachekd.models import LiveTeacher, ModelFiles, SwitchedTeacher, load_model
from cachekd.train.arguments import CHECKPOINTING
from cachekd.train.batch import Example
from cachekd.train.teacher import recompute_frozen_layers

VARIANTS = ("naive", "live", "cached", "cached, recomputed layers")
TEACHER = Tower(layers=4, width=64), Text(layers=4, width=128)
STUDENT = Tower(layers=2, width=64), Text(layers=2, width=64)


@torch.no_grad()
def cached_targets(teacher: LlavaForConditionalGeneration, sample: Encoded) -> CachedTargets:
    """What a dump keeps of one sample."""
    inputs = {"input_ids": sample.inputs["input_ids"][None], "pixel_values": sample.inputs["pixel_values"]}
    logits = teacher(**inputs).logits[predicting_positions(sample.supervised[None])]
    records = select_topk(logits, sample.token_ids, top_k=64, top_p=0.0, window=WINDOW, min_k=MIN_K)
    return CachedTargets.from_sparse(records, vocab_size=logits.shape[1], window=WINDOW, min_k=MIN_K)


def lean(variant: str, folder: Path, options: argparse.Namespace) -> float:
    """cachekd's trainer; the loss of the first step."""
    live, recomputed = variant == "live", variant == VARIANTS[3]
    files = ModelFiles(folder / "teacher")
    teacher = SwitchedTeacher(files.load(dtype=torch.float32, device=CPU, tower=live))
    if recomputed:
        recompute_frozen_layers(teacher.model)
    data = random_samples(options.batch, options.length, options.vocab, STUDENT[0])
    targets = [None] * len(data) if live else torch.load(folder / "targets.pt", weights_only=False)
    trainer = lean_trainer(
        load_model(str(folder / "student"), dtype=torch.float32, device=CPU),
        Examples([Example(encoded, target) for encoded, target in zip(data, targets, strict=True)], 2),
        folder / "out",
        batch=len(data),
        settings={"use_cpu": True, CHECKPOINTING: recomputed},
        weights={"align": 1.0, "vsd": 1.0},
        teacher=teacher,
        live=LiveTeacher(teacher, options.vocab) if live else None,
    )
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def naive(folder: Path, options: argparse.Namespace) -> float:
    """Two whole models, logits of every position, all answer tokens at once; the loss of the first step."""
    student, teacher = (
        load_model(str(folder / name), dtype=torch.float32, device=CPU) for name in ("student", "teacher")
    )
    data = random_samples(options.batch, options.length, options.vocab, STUDENT[0])
    both = Naive(student, teacher, data)
    first, _ = both.step(), both.step()
    return first


def run_variant(variant: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """In this process."""
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    before, started = resident("VmRSS"), time.perf_counter()
    loss = naive(folder, options) if variant == "naive" else lean(variant, folder, options)
    seconds = time.perf_counter() - started
    return {
        "variant": variant,
        "peak_mb": (resident("VmHWM") - before) / 1e6,
        "seconds": seconds,
        "loss": loss,
    }


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Models and what a cache holds."""
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    save_vlm(folder / "teacher", options.vocab, *TEACHER, seed=1)
    save_vlm(folder / "student", options.vocab, *STUDENT, seed=2)
    teacher = load_model(str(folder / "teacher"), dtype=torch.float32, device=CPU)
    data = random_samples(options.batch, options.length, options.vocab, TEACHER[0])
    torch.save([cached_targets(teacher, sample) for sample in data], folder / "targets.pt")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=160, help="tokens per sample, half of them answers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        apart(prepare, Path(name), options)
        rows = [apart(run_variant, variant, Path(name), options) for variant in VARIANTS]
    if options.json:
        print(json.dumps(rows))
        return
    title = f"V = {options.vocab:,}, {options.batch} x {options.length} tokens, half of them answers"
    table = Table("", "peak MB", "smaller", "seconds for 2 steps", "loss", title=title)
    for row in rows:
        smaller = f"{rows[0]['peak_mb'] / row['peak_mb']:.1f}x"
        table.add_row(
            row["variant"], f"{row['peak_mb']:,.0f}", smaller, f"{row['seconds']:.1f}", f"{row['loss']:.4f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
