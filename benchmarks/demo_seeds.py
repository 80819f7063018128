"""Does Switch-KD help on the demo's data, over seeds?

    python benchmarks/demo_seeds.py --seeds 5
    python benchmarks/demo_seeds.py --seeds 5 --methods ce,switch_kd,vsd_every_2,vsd_every_4
    python benchmarks/demo_seeds.py --seeds 5 --set vsd_every=2

For every seed a CE-only and a Switch-KD student start from the same weights and see the same data in the same
order, for the same steps. `--json` prints {"teacher": [...], "ce": [...], "switch_kd": [...]}, a list for
each of the methods. `--set` changes the recipe of all of them; what a method is named for stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from cachekd.config import DumpConfig, EvalConfig, TrainConfig, read_config
from cachekd.dump import dump
from cachekd.evaluate.run import evaluate
from cachekd.train import train

EXAMPLE = Path(__file__).parents[1] / "examples" / "easy_vqa"
METHODS: dict[str, dict[str, Any]] = {
    "ce": {"lambda_align": 0.0, "lambda_vsd": 0.0},
    "switch_kd": {},
    "align_only": {"lambda_vsd": 0.0},
    "vsd_only": {"lambda_align": 0.0},
    "vsd_every_2": {"vsd_every": 2},
    "vsd_every_4": {"vsd_every": 4},
}


def run_seed(work: Path, seed: int, methods: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Test accuracy per method, and the teacher's."""
    prepared = work / f"seed-{seed}"
    sizes = {"images": options.images, "test-images": options.test_images, "turns": options.turns}
    amounts = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    prepare = [sys.executable, str(EXAMPLE / "prepare.py"), "--out", str(prepared), "--seed", str(seed)]
    subprocess.run([*prepare, *amounts], check=True, capture_output=True)
    teacher, cache = str(EXAMPLE / "teacher"), work / "cache"
    if not cache.exists():  # the data is the same for every seed
        settings = {"teacher": teacher, "data": prepared / "train", "out": cache, "batch_size": 64}
        dump(read_config(None, DumpConfig, settings))
    common: dict[str, Any] = {"student": str(prepared / "student"), "data": prepared / "train", "seed": seed}
    changed = {name: yaml.safe_load(value) for name, value in (item.split("=", 1) for item in options.set)}
    for method in methods:
        settings = {**common, "teacher": teacher, "cache": cache, "out": prepared / method}
        train(read_config(EXAMPLE / "recipe.yaml", TrainConfig, {**settings, **changed, **METHODS[method]}))
    runs = [str(prepared / method) for method in methods]
    tested = {"models": runs, "data": prepared / "test", "teacher": teacher, "blind": False}
    result = evaluate(read_config(None, EvalConfig, tested))
    assert result.teacher is not None
    scores = {method: score.exact_match for method, score in zip(methods, result.models, strict=True)}
    return {"teacher": result.teacher.exact_match, **scores}


def print_table(rows: list[dict[str, float]], seeds: list[int], console: Console) -> None:
    """Accuracies per seed, their mean, and the gain over CE with its standard error."""
    table = Table("seed", *rows[0])
    for seed, row in zip(seeds, rows, strict=True):
        table.add_row(str(seed), *(f"{100 * value:.2f}" for value in row.values()))
    table.add_section()
    table.add_row("mean", *(f"{100 * statistics.mean(row[name] for row in rows):.2f}" for name in rows[0]))
    console.print(table)
    for method in [name for name in rows[0] if name not in ("teacher", "ce")]:
        gains = [100 * (row[method] - row["ce"]) for row in rows]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        console.print(f"{method} - ce: {statistics.mean(gains):+.2f} points, standard error {error:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", default="ce,switch_kd", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the recipe")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            rows.append(run_seed(Path(folder), seed, methods, options))
            shown = "  ".join(f"{name} {100 * value:.2f}" for name, value in rows[-1].items())
            print(f"seed {seed}: {shown}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({name: [row[name] for row in rows] for name in rows[0]}))
    else:
        print_table(rows, seeds, Console())


if __name__ == "__main__":
    main()
