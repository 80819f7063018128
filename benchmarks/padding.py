"""How much of a batch is padding: samples in random order, grouped by length, and by padded tokens.

    python benchmarks/padding.py --student examples/easy_vqa/student --data runs/demo/train

Every sample is read and encoded, so that the shares are of true lengths; `train_sampling_strategy:
group_by_length` and `batch_tokens` (here those of a batch of the longest sample) work with rough ones.
Also printed: how far these are off. `--map padding:fewer_turns` keeps 1 to 10 questions of each sample.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any
from zlib import crc32

import torch
from rich.console import Console
from rich.table import Table

from cachekd.data import open_samples, rough_lengths
from cachekd.data.batches import BatchLimits
from cachekd.models import ModelFiles
from cachekd.train.order import LengthGroups, TokenBatches


def fewer_turns(record: dict[str, Any]) -> dict[str, Any]:
    """Keep 1 to 10 questions with their answers, of a record of easy-VQA's tars."""
    values = json.loads(record["json"])
    kept = 2 * (1 + crc32(record["__key__"].encode()) % 10)
    return {"image": record["png"], "conversations": values["conversations"][:kept]}


def in_batches(order: list[int], batch_size: int) -> list[list[int]]:
    """As the Trainer cuts an order."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def cost(lengths: list[int], batches: list[list[int]]) -> dict[str, float]:
    """How many batches, the largest one's padded tokens, and the share of cells that hold no token."""
    cells = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    return {"batches": len(batches), "most_tokens": max(cells), "padding": 1 - sum(lengths) / sum(cells)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True, help="whose processor is used")
    parser.add_argument("--data", required=True)
    parser.add_argument("--map", help="as for `cachekd train`")
    parser.add_argument("--limit", type=int, default=1000, help="samples, at random")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    samples = open_samples(options.data, map=options.map, limit=options.limit, shuffle_seed=0)
    encoder = ModelFiles(options.student).encoder
    rough = rough_lengths(samples, encoder)
    true = [len(encoder(samples[index])) for index in range(len(samples))]
    shuffled = random.Random(0).sample(range(len(true)), len(true))
    grouped = list(LengthGroups(rough, options.batch_size, seed=0, epoch=lambda: 0))
    off = (torch.tensor(rough) - torch.tensor(true)).abs().float()
    limits = BatchLimits(tokens=options.batch_size * max(rough))
    orders = {
        "random": cost(true, in_batches(shuffled, options.batch_size)),
        "group_by_length": cost(true, in_batches(grouped, options.batch_size)),
        f"batch_tokens {limits.tokens}": cost(
            true, list(TokenBatches(rough, limits, processes=1, seed=0, epoch=lambda: 0))
        ),
    }
    result = {
        "samples": len(true),
        "tokens": {"least": min(true), "mean": sum(true) / len(true), "most": max(true)},
        "orders": orders,
        "rough_lengths_off_by": {"mean": float(off.mean()), "most": float(off.max())},
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table(
        "order",
        "batches",
        "most padded tokens",
        "padding",
        title=f"{len(true):,} samples, batches of {options.batch_size}",
    )
    for name, found in orders.items():
        table.add_row(name, str(found["batches"]), f"{found['most_tokens']:,}", f"{found['padding']:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"tokens a sample: {min(true)} to {max(true)}; rough lengths are off by up to {off.max():.0f}"
    )


if __name__ == "__main__":
    main()
