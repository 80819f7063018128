"""Time and peak memory of DBiLD's O(k) form against the pairwise form; and of every loss, cached and live.

    python benchmarks/dbild.py
    python benchmarks/dbild.py --device cuda --tokens 4000 --json
    python benchmarks/dbild.py --losses --tokens 128      # of all losses, at a real vocabulary

Both do the same job (k ids per token, reverse KL); their values are compared before anything is timed. Memory
is the peak of what tensors hold beyond the inputs: by the profiler on a CPU, by the allocator on a GPU. All
times are of forward and backward.

With `--losses` the teacher is a head on random states of SmolLM2's width and vocabulary; its cache is made of
these states as by a dump, with a tail sketch. A live teacher's logits are there already; what its head costs
is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cachekd.cache import CachedTargets
from cachekd.cache.roundtrip import roundtrip
from cachekd.config.losses import LOSSES
from cachekd.losses import loss_function
from cachekd.losses.dbild import pairwise_reverse_kl
from cachekd.losses.targets import DenseTargets

SIZES = (8, 16, 32, 64, 128, 256)
TEMPERATURE = 3.0
WIDTH, VOCABULARY = 576, 49_152  # SmolLM2-135M's
WAYS = ("cached", "live")
Loss = Callable[[Tensor, Tensor], Tensor]


def pairwise(student: Tensor, teacher: Tensor) -> Tensor:
    """The definition: every pair formed. [N, K] to [N]."""
    left, right = torch.triu_indices(student.shape[-1], student.shape[-1], 1, device=student.device)
    p, q = (((z[:, left] - z[:, right]) / TEMPERATURE).log_softmax(-1) for z in (student, teacher))
    return (p.exp() * (p - q)).sum(-1)


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    """The same from cumulative sums."""
    k = torch.full((len(student),), student.shape[-1], device=student.device)
    return pairwise_reverse_kl(student, teacher, k, TEMPERATURE)


def step(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    """Forward and backward."""
    student.grad = None
    loss(student, teacher).sum().backward()


def milliseconds(loss: Loss, student: Tensor, teacher: Tensor, repeats: int) -> float:
    """The fastest of `repeats` steps, after one to warm up."""
    return fastest(partial(step, loss, student, teacher), repeats, student.device)


def fastest(
    work: Callable[[], object],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Milliseconds of the fastest of `repeats` times, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - started)
    return 1000 * min(times[1:])


def peak_megabytes(loss: Loss, student: Tensor, teacher: Tensor) -> float:
    """The most that one step holds at a time, beyond its inputs."""
    if student.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, student, teacher)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(loss, student, teacher)
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def measure(k: int, tokens: int, repeats: int, device: str) -> dict[str, float]:
    """One row."""
    generator = torch.Generator().manual_seed(k)
    student, teacher = (3 * torch.randn(tokens, k, generator=generator) for _ in range(2))
    student, teacher = student.to(device).requires_grad_(), teacher.to(device)
    torch.testing.assert_close(
        ours(student, teacher), pairwise(student, teacher), rtol=1e-3, atol=1e-4
    )  # the same loss
    row: dict[str, float] = {"k": k}
    for name, loss in (("pairwise", pairwise), ("ours", ours)):
        row[f"{name}_ms"] = milliseconds(loss, student, teacher, repeats)
    for name, loss in (("pairwise", pairwise), ("ours", ours)):
        row[f"{name}_mb"] = peak_megabytes(loss, student, teacher)
    return row


def teacher_at(tokens: int, device: str, vocabulary: int = VOCABULARY) -> tuple[CachedTargets, Tensor]:
    """The cached targets of some answer tokens, and the teacher's logits [N, V] there."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(vocabulary, WIDTH, generator=generator)
    widths = (
        torch.arange(1, WIDTH + 1) ** -0.75
    )  # a few directions hold most of the variance, as in real ones
    states = 2 * torch.randn(max(2048, tokens), WIDTH, generator=generator) * widths
    targets, _ = roundtrip(
        states[:tokens], head, torch.zeros(tokens, dtype=torch.long), tail="bytes=64", calibration=states
    )
    return targets.to(device), (states[:tokens] @ head.T).to(device)


def measure_losses(tokens: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """One row for each loss of the table: milliseconds for each token; and what is held at the peak beyond
    both models' logits, the gradient included, in arrays as large as these."""
    cached, logits = teacher_at(tokens, device)
    student = (logits + torch.randn(logits.shape, device=logits.device)).requires_grad_()
    ways: tuple[Callable[[Tensor], Any], ...] = (lambda _logits: cached, DenseTargets)
    rows = []
    for name, kind in LOSSES.items():
        how = kind(loss=name).arguments({"temperature": TEMPERATURE})
        of_teacher = partial(loss_function(name), reduction="none", **how)
        row: dict[str, Any] = {"loss": name}
        for way, targets_of in zip(WAYS, ways, strict=True):
            loss = partial(_with_targets, of_teacher, targets_of)
            row[f"{way}_ms"] = milliseconds(loss, student, logits, repeats) / tokens
            row[f"{way}_arrays"] = peak_megabytes(loss, student, logits) * 1e6 / (4 * logits.numel())
        rows.append(row)
    return rows


def _with_targets(
    loss: Callable[..., Tensor], targets_of: Callable[[Tensor], Any], student: Tensor, teacher: Tensor
) -> Tensor:
    return loss(student, targets_of(teacher))


def print_losses(rows: list[dict[str, Any]], title: str) -> None:
    """For people."""
    table = Table(
        "loss", *(f"{way}, {what}" for way in WAYS for what in ("ms a token", "arrays")), title=title
    )
    for row in rows:
        figures = (f"{row[f'{way}_{what}']:.2f}" for way in WAYS for what in ("ms", "arrays"))
        table.add_row(row["loss"], *figures)
    Console().print(table)


def print_table(rows: list[dict[str, float]], title: str) -> None:
    """For people."""
    table = Table("k", "pairwise ms", "ours ms", "faster", "pairwise MB", "ours MB", "smaller", title=title)
    for row in rows:
        table.add_row(
            f"{row['k']}",
            f"{row['pairwise_ms']:.2f}",
            f"{row['ours_ms']:.2f}",
            f"{row['pairwise_ms'] / row['ours_ms']:.1f}x",
            f"{row['pairwise_mb']:.2f}",
            f"{row['ours_mb']:.2f}",
            f"{row['pairwise_mb'] / row['ours_mb']:.1f}x",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--losses", action="store_true", help="of every loss, at a vocabulary of 49,152")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    title = f"{options.tokens} tokens, {options.device}, {options.threads} thread(s)"
    if options.losses:
        rows = measure_losses(options.tokens, options.repeats, options.device)
        print(json.dumps(rows)) if options.json else print_losses(rows, title)
        return
    rows = [measure(k, options.tokens, options.repeats, options.device) for k in SIZES]
    if options.json:
        print(json.dumps(rows))
    else:
        print_table(rows, title)


if __name__ == "__main__":
    main()
