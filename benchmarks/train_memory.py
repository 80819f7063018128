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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TrainingArguments,
)

from cachekd.cache import CachedTargets
from cachekd.cache.select import select_topk
from cachekd.lean import recompute_frozen_layers
from cachekd.losses import cross_entropy_loss, dbild_loss
from cachekd.samples import Encoded, predicting_positions
from cachekd.targets import DenseTargets
from cachekd.trainer import SwitchKDTrainer
from cachekd.training_data import Example, collate_with_targets
from cachekd.vlm import LiveTeacher, SwitchedTeacher, capture_vision, load_model

VARIANTS = ("naive", "live", "cached", "cached, recomputed layers")
WINDOW, MIN_K, IMAGE_TOKENS, IMAGE_TOKEN = 128, 2, 16, 5
CPU = torch.device("cpu")


def save_vlm(folder: Path, vocab: int, *, layers: int, width: int, seed: int) -> None:
    """A LLaVA with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def samples(count: int, length: int, vocab: int) -> list[Encoded]:
    """Random tokens after an image; the second half of each is the answer."""
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for index in range(count):
        ids = torch.randint(IMAGE_TOKEN + 1, vocab, (length,), generator=generator)
        ids[:IMAGE_TOKENS] = IMAGE_TOKEN
        pixels = torch.randn(1, 3, 32, 32, generator=generator)
        supervised = torch.arange(length) >= length // 2
        encoded.append(Encoded(str(index), bytes(16), {"input_ids": ids, "pixel_values": pixels}, supervised))
    return encoded


@torch.no_grad()
def cached_targets(teacher: LlavaForConditionalGeneration, sample: Encoded) -> CachedTargets:
    """What a dump keeps of one sample."""
    inputs = {"input_ids": sample.inputs["input_ids"][None], "pixel_values": sample.inputs["pixel_values"]}
    logits = teacher(**inputs).logits[predicting_positions(sample.supervised[None])]
    records = select_topk(logits, sample.token_ids, top_k=64, top_p=0.0, window=WINDOW, min_k=MIN_K)
    return CachedTargets.from_records(records, vocab_size=logits.shape[1], window=WINDOW, min_k=MIN_K)


class Examples(Dataset):
    """The batch, twice: one for each step."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples * 2

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def lean(folder: Path, options: argparse.Namespace) -> float:
    """cachekd's trainer; the loss of the first step."""
    live, recomputed = options.variant == "live", options.variant == VARIANTS[3]
    teacher = SwitchedTeacher.load(str(folder / "teacher"), dtype=torch.float32, device=CPU, with_tower=live)
    if recomputed:
        recompute_frozen_layers(teacher.model)
    data = samples(options.batch, options.length, options.vocab)
    targets = [None] * len(data) if live else torch.load(folder / "targets.pt", weights_only=False)
    trainer = SwitchKDTrainer(
        load_model(str(folder / "student"), dtype=torch.float32, device=CPU),
        TrainingArguments(
            str(folder / "out"),
            per_device_train_batch_size=options.batch,
            num_train_epochs=1,
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            activation_checkpointing=recomputed,
        ),
        Examples([Example(encoded, target) for encoded, target in zip(data, targets, strict=True)]),
        pad_token_id=0,
        teacher=teacher,
        live=LiveTeacher(teacher, options.vocab, WINDOW, MIN_K) if live else None,
    )
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def naive(folder: Path, options: argparse.Namespace) -> float:
    """Two whole models, logits of every position, all answer tokens at once; the loss of the first step."""
    student, teacher = (
        load_model(str(folder / name), dtype=torch.float32, device=CPU) for name in ("student", "teacher")
    )
    switched = SwitchedTeacher(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5)
    data = samples(options.batch, options.length, options.vocab)
    batch = collate_with_targets([Example(encoded) for encoded in data], 0)
    supervised = batch["labels"] != -100
    positions, ids = predicting_positions(supervised), batch["input_ids"][supervised]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    def dbild(logits: Tensor, targets: DenseTargets) -> Tensor:
        return dbild_loss(logits, targets, window=WINDOW, min_k=MIN_K)

    losses = []
    for _ in range(2):
        with torch.no_grad():
            targets = DenseTargets(teacher(**inputs).logits[positions], ids)
        with capture_vision(student) as vision:
            logits = student(**inputs).logits[positions]
        assert vision.output is not None
        everywhere = torch.ones_like(positions)
        other = switched.logits(vision.output, inputs, everywhere)[positions.flatten()]
        loss = cross_entropy_loss(logits, ids) + dbild(logits, targets) + dbild(other, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0]


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def run_variant(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """In this process."""
    torch.set_num_threads(options.threads)
    before, started = resident("VmRSS"), time.perf_counter()
    loss = (naive if options.variant == "naive" else lean)(folder, options)
    seconds = time.perf_counter() - started
    return {
        "variant": options.variant,
        "peak_mb": (resident("VmHWM") - before) / 1e6,
        "seconds": seconds,
        "loss": loss,
    }


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Models and what a cache holds."""
    save_vlm(folder / "teacher", options.vocab, layers=4, width=128, seed=1)
    save_vlm(folder / "student", options.vocab, layers=2, width=64, seed=2)
    teacher = load_model(str(folder / "teacher"), dtype=torch.float32, device=CPU)
    data = samples(options.batch, options.length, options.vocab)
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
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant is not None:
        print(json.dumps(run_variant(options.folder, options)))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options)
        rows = []
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--variant", variant, "--folder", name]
            for option in ("vocab", "batch", "length", "threads"):
                command += [f"--{option}", str(getattr(options, option))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
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
