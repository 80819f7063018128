"""What `benchmarks/gpu.py` measures: a function for each, over one pair of models and one data set."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from clock import seconds_of
from real_size import SIZES, files_of, processor_of, random_model, write_data
from small_vlm import WINDOW

from cachekd.cache import CachedTargets, LogitCache, TailStates
from cachekd.cache.layout import SKETCH_FILE
from cachekd.cache.tail.encoder import read_encoder
from cachekd.config import DataOptions, DumpConfig
from cachekd.data import Samples, collate, open_samples
from cachekd.data.collate import ModelInputs
from cachekd.dump import dump as run_dump
from cachekd.dump.pilot import Pilot
from cachekd.dump.plan import codec_of
from cachekd.dump.teacher import Teacher
from cachekd.losses import dbild_loss, forward_kl_loss
from cachekd.losses.targets import DenseTargets
from cachekd.models import hidden_and_logits_at
from cachekd.models.device import default_dtype, free_memory, peak_memory, reset_peak, synchronize
from cachekd.train.flops import FlopCounter

Found = dict[str, Any]
# Of dense bfloat16 products, FLOP/s, as the makers say; the first name that a card's has in it counts.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


class Lab:
    """Models and data, each made when it is first asked for, and used by all measurements.

    Args:
        size: in `SIZES`.
        workers: processes that read samples.
        folder: for the data, the cache, and what the Trainer writes.
    """

    def __init__(self, size: str, device: torch.device, workers: int, folder: Path) -> None:
        self.sizes, self.device, self.workers, self.folder = SIZES[size], device, workers, folder
        self.dtype = default_dtype(device)
        self.processor = processor_of(self.sizes)
        self.files = {
            name: files_of(self.sizes, getattr(self.sizes, name), self.processor, name)
            for name in ("teacher", "student")
        }
        self.batch_flops = 0

    @cached_property
    def samples(self) -> Samples:
        """The data set."""
        return open_samples(DataOptions(data=str(write_data(self.folder / "data", self.sizes))))

    @cached_property
    def teacher(self) -> Any:
        """In the device's own dtype."""
        return random_model(self.files["teacher"].config, dtype=self.dtype, device=self.device, seed=0)

    @cached_property
    def student(self) -> Any:
        """In float32, as it trains."""
        return random_model(self.files["student"].config, dtype=torch.float32, device=self.device, seed=1)

    @cached_property
    def config(self) -> DumpConfig:
        """Of the dump; a shard is what is sorted by length together."""
        batch = self.sizes.dump_batch
        return DumpConfig(
            teacher="teacher",
            data=str(self.folder / "data" / "data.json"),
            out=self.folder / "cache",
            batch_size=batch,
            shard_samples=16 * batch,  # two of the groups that are sorted by length
            calibration_tokens=4 * batch * (self.sizes.answer + 1),
            workers=self.workers,
            top_k=min(128, self.sizes.vocab),
        )

    @cached_property
    def dumping(self) -> Teacher:
        """The teacher as stage one runs it."""
        bare = Teacher(self.files["teacher"], self.teacher, codec_of(self.config))
        return bare.with_head(bare.encoder(self.samples[0]))

    @cached_property
    def length(self) -> int:
        """Tokens of a sample, the picture's among them."""
        return len(self.files["teacher"].encoder(self.samples[0]))

    def inputs(self, count: int, whose: str) -> ModelInputs:
        """A batch on the device."""
        encoder = self.files[whose].encoder
        encoded = [encoder(self.samples[index]) for index in range(count)]
        return ModelInputs.of(collate(encoded, encoder.pad_token_id)).to(self.device)

    @property
    def peak_flops(self) -> float | None:
        """The card's; None where the table lacks it."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak for card, peak in PEAKS.items() if card in name), None)

    def rate(self, flops: float, seconds: float) -> Found:
        """TFLOP/s, and as a share of the card's peak."""
        found = {"tflops": flops / seconds / 1e12}
        return found if self.peak_flops is None else found | {"mfu": flops / seconds / self.peak_flops}


def device(lab: Lab) -> Found:
    """Which card, and what it makes of one large product."""
    rows, found = lab.sizes.matmul, {"name": "CPU", "torch": torch.__version__}
    if lab.device.type == "cuda":
        found["name"] = torch.cuda.get_device_name(lab.device)
    left, right = (torch.randn(rows, rows, dtype=lab.dtype, device=lab.device) for _ in range(2))
    return found | lab.rate(2 * rows**3, seconds_of(lambda: left @ right, lab.device, repeats=20))


def forward(lab: Lab) -> Found:
    """The teacher's bare forward, its inputs on the device, logits at the answer tokens alone."""
    inputs, batch = lab.inputs(lab.sizes.dump_batch, "teacher"), lab.sizes.dump_batch

    @torch.inference_mode()
    def run() -> None:
        hidden_and_logits_at(lab.teacher, inputs.tensors, inputs.positions)

    run()
    with FlopCounter() as counted:
        run()
    lab.batch_flops = counted.flops
    reset_peak()
    seconds = seconds_of(run, lab.device)
    tokens = batch * lab.length
    found = {"ms": 1e3 * seconds, "batch": batch, "tokens": tokens, "tokens_per_s": tokens / seconds}
    return found | lab.rate(lab.batch_flops, seconds) | {"peak_gb": peak_memory() / 1e9}


def dump(lab: Lab) -> Found:
    """`cachekd dump`, but that the teacher is in memory already, and that the pilot's answers are not used
    again: so every sample is run."""
    at: dict[str, list[tuple[float, int]]] = {"pilot": [], "dump": []}

    def tick(phase: str, _total: int | None, samples: int, _tokens: int) -> None:
        at[phase].append((time.perf_counter(), samples))

    opened = lab.samples, lab.dumping
    reset_peak()
    started = time.perf_counter()
    with (
        patch("cachekd.dump.run.open_inputs", lambda _config: opened),
        patch.object(Pilot, "reusable", lambda _pilot, _plan: {}),
    ):
        summary = run_dump(lab.config, tick)
    ended, (begun, _), (piloted, _) = time.perf_counter(), at["dump"][0], at["pilot"][-1]
    done = [when for when, samples in at["dump"] if samples]
    # From the first group's end on, reading is ahead, and a long dump is like this. The last shard is packed
    # while nothing else is to be done, which a long dump does not notice.
    first = 8 * lab.sizes.dump_batch
    steady = (done[-1] - done[first - 1]) / (len(done) - first)
    found = {
        "samples": len(done),
        "pilot_s": piloted - started,
        "fit_s": begun - piloted,
        "first_group_s": done[first - 1] - begun,
        "steady_s": done[-1] - done[first - 1],
        "last_shard_s": ended - done[-1],
        "samples_per_s": 1 / steady,
        "tokens_per_s": lab.length / steady,
        "answer_tokens_per_s": (lab.sizes.answer + 1) / steady,
        "bytes_per_token": summary.bytes_per_token,
        "peak_gb": peak_memory() / 1e9,
    }
    return found | lab.rate(lab.batch_flops / lab.sizes.dump_batch, steady) if lab.batch_flops else found


def look_up(lab: Lab) -> Found:
    """What a loss asks a cache for, on the device: 128 ids a token; and coding, as a dump does it."""
    cache, rows = LogitCache(lab.config.out), lab.sizes.rows
    keys = list(cache)[: -(-rows // (lab.sizes.answer + 1))]
    targets = CachedTargets.cat([cache[key] for key in keys]).to(lab.device)
    ids = torch.randint(lab.sizes.vocab, (len(targets), WINDOW), device=lab.device)
    encoder = read_encoder(lab.config.out / SKETCH_FILE)
    hidden = torch.randn(8 * rows, lab.teacher.config.text_config.hidden_size, device=lab.device)
    states = TailStates(hidden.to(lab.dtype), torch.zeros(len(hidden), device=lab.device))
    gathering = seconds_of(lambda: targets.gather(ids), lab.device)
    coding = seconds_of(lambda: encoder.encode(states), lab.device)
    return {
        "axes": encoder.sketch.axes,
        "gather_tokens_per_s": len(targets) / gathering,
        "encode_tokens_per_s": len(hidden) / coding,
    }


def losses(lab: Lab) -> Found:
    """DBiLD and KL over the whole vocabulary: forward and backward, and what they hold beside inputs."""
    shape = lab.sizes.rows, lab.sizes.vocab
    logits = (3 * torch.randn(shape, device=lab.device)).requires_grad_()
    targets = DenseTargets(3 * torch.randn(shape, device=lab.device))
    found: Found = {"rows": shape[0], "vocab": shape[1]}
    for name, loss in (("dbild", dbild_loss), ("kl", forward_kl_loss)):

        def run(loss: Any = loss) -> None:
            logits.grad = None
            loss(logits, targets).backward()

        found[f"{name}_ms"] = 1e3 * seconds_of(run, lab.device)
        logits.grad = None
        free_memory()
        with _peak_beyond(found, f"{name}_gb"):
            run()
    return found


@contextmanager
def _peak_beyond(found: Found, name: str) -> Iterator[None]:
    gc.collect()
    reset_peak()
    before = peak_memory()
    yield
    synchronize()
    found[name] = (peak_memory() - before) / 1e9
