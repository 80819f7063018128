"""How much of a batch is padding: samples in random order, and grouped by length.

    python benchmarks/padding.py --student runs/demo/student --data runs/demo/train

Every sample is read and encoded, so that the shares are of true lengths; the grouping has the rough ones that
`train_sampling_strategy: group_by_length` works with. Also printed: how far the rough ones are off.
"""

from __future__ import annotations

import argparse
import json
import random

import torch
from rich.console import Console
from rich.table import Table

from cachekd.data import open_samples, rough_lengths
from cachekd.models import ModelFiles
from cachekd.train.order import LengthGroups


def padding_share(lengths: list[int], order: list[int], batch_size: int) -> float:
    """Cells of right-padded batches that hold no token."""
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    cells = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths) / cells


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
    padding = {
        "random": padding_share(true, shuffled, options.batch_size),
        "group_by_length": padding_share(true, grouped, options.batch_size),
    }
    result = {
        "samples": len(true),
        "tokens": {"least": min(true), "mean": sum(true) / len(true), "most": max(true)},
        "padding": padding,
        "rough_lengths_off_by": {"mean": float(off.mean()), "most": float(off.max())},
    }
    if options.json:
        print(json.dumps(result))
        return
    table = Table("order", "padding", title=f"{len(true):,} samples, batches of {options.batch_size}")
    for name, share in padding.items():
        table.add_row(name, f"{share:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"tokens a sample: {min(true)} to {max(true)}; rough lengths are off by up to {off.max():.0f}"
    )


if __name__ == "__main__":
    main()
