"""A teacher with more layers than there is memory for: peak memory and speed, whole against split.

    python benchmarks/offload.py
    python benchmarks/offload.py --layers 32 --json

A LLaVA with random weights in float32 answers one batch as a dump has it, on a CPU, in a process of its own
for each part of its weights that may stay in memory; the other layers are read from its safetensors file in
every forward. "same" compares the logits with those of the whole teacher, bit for bit. The peak is what the
process holds beyond what it held before, with the pages of the file: on a CPU weights are mapped from it
either way, and the system takes pages back at need, so this is no measure of what is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from apart import apart, resident
from rich.console import Console
from rich.table import Table
from small_vlm import CPU, Text, Tower, random_samples, save_vlm

from cachekd.data import collate
from cachekd.data.collate import ModelInputs
from cachekd.models import hidden_and_logits_at, load_model
from cachekd.models.placement import is_offloaded, layers_of

TOWER, VOCAB = Tower(layers=2, width=64), 8_192


def prepare(folder: Path, options: argparse.Namespace) -> int:
    """Write the teacher; its weights' bytes."""
    text = Text(layers=options.layers, width=options.width, heads=8, inner=4.0)
    save_vlm(folder, VOCAB, TOWER, text, seed=1)
    return (folder / "model.safetensors").stat().st_size


@torch.inference_mode()
def run(folder: Path, room: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """Answer the batch three times; the first is not timed.

    Args:
        room: bytes for weights; None: as many as there are.
    """
    torch.set_num_threads(options.threads)
    before = resident("VmRSS")
    settings: Any = {} if room is None else {"device_map": "auto", "max_memory": {"cpu": room}}
    model = load_model(str(folder), dtype=torch.float32, device=CPU, **settings)
    batch = ModelInputs.of(collate(random_samples(options.batch, options.length, VOCAB, TOWER), 0))
    for turn in range(3):
        if turn == 1:
            started = time.perf_counter()
        _, logits = hidden_and_logits_at(model, batch.tensors, batch.positions)
    seconds = (time.perf_counter() - started) / 2
    return {
        "layers_on_disk": sum(map(is_offloaded, layers_of(model).values())),
        "peak_mb": (resident("VmHWM") - before) / 1e6,
        "tokens_per_s": options.batch * options.length / seconds,
        "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens per sample")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        size = apart(prepare, Path(name), options)
        rooms = {"all": None, "half": size // 2, "a quarter": size // 4}
        rows = [{"room": room} | apart(run, Path(name), rooms[room], options) for room in rooms]
    whole = rows[0]["logits"]
    for row in rows:
        row["same"] = row.pop("logits") == whole
    if options.json:
        print(json.dumps(rows))
        return
    title = f"{size / 1e6:,.0f} MB of weights, {options.batch} x {options.length} tokens"
    table = Table(
        "weights in memory", "layers on the disk", "peak MB", "tokens/s", "same logits", title=title
    )
    for row in rows:
        table.add_row(
            row["room"],
            str(row["layers_on_disk"]),
            f"{row['peak_mb']:,.0f}",
            f"{row['tokens_per_s']:,.0f}",
            str(row["same"]),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
