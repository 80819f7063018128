"""What is lost by recompressing a cache instead of dumping it again, on SmolLM2-135M's real states.

python benchmarks/recompress.py --states states.pt --calibration-blocks 24 --scored-blocks 8
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import smollm2
import torch
from rate_distortion import ours, score
from rate_rows import Row, print_table
from rich.console import Console
from smollm2 import States, load_states

from cachekd.cache import CachedTargets, LogitCache
from cachekd.cache.recompress import recompress

# Dumped with; recompressed to.
PAIRS = [
    (("bytes=120", 128), ("bytes=64", 128)),
    (("bytes=120", 128), ("bytes=32", 128)),
    (("bytes=120", 128), ("bytes=64", 32)),
    (("none", 64), ("none", 16)),
]


def rows_of(
    states: States, before: tuple[str, int], after: tuple[str, int], folder: Path
) -> list[tuple[Row, CachedTargets]]:
    """A cache, what it is recompressed to, and what a dump would have made instead."""
    nothing = torch.zeros(len(states.teacher), 1, dtype=torch.long)  # to look up: speed is not asked for
    rows = []
    for name, (tail, top_k) in (("before", before), ("direct", after)):
        (folder / name).mkdir()
        row, targets = ours(states, nothing, tail, top_k, folder / name)
        row.name = f"{row.name}, top_k={top_k}, dumped"
        rows.append((row, targets))
    tail, top_k = after
    manifest = recompress(
        folder / "before" / "cache",
        folder / "after",
        top_k=top_k if top_k != before[1] else None,
        tail=tail if tail != before[0] else None,
    )
    cache = LogitCache(folder / "after")
    size, basis = manifest.size / manifest.tokens, manifest.sketch_bytes / 1e6
    row = Row(f"{tail}, top_k={top_k}, recompressed from {before[0]}, {before[1]}", size, basis, 0.0, 0.0)
    return [*rows, (row, CachedTargets.cat([cache[key] for key in cache]))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", type=Path, help="keep the models' states here between runs")
    parser.add_argument("--calibration-blocks", type=int, default=smollm2.CALIBRATION_BLOCKS)
    parser.add_argument("--scored-blocks", type=int, default=smollm2.SCORED_BLOCKS)
    arguments = parser.parse_args()
    smollm2.CALIBRATION_BLOCKS = arguments.calibration_blocks
    smollm2.SCORED_BLOCKS = arguments.scored_blocks
    states, rows = load_states(arguments.states), []
    with tempfile.TemporaryDirectory() as folder:
        for number, (before, after) in enumerate(PAIRS):
            (Path(folder) / str(number)).mkdir()
            for row, targets in rows_of(states, before, after, Path(folder) / str(number)):
                row.name = f"{number}: {row.name}"
                rows.append((row, targets))
        score(rows, states)
    print_table([row for row, _ in rows], Console(width=200))


if __name__ == "__main__":
    main()
