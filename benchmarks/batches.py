"""A dump's batches by number of samples against batches by padded tokens: forwards, peak memory, tokens/s.

    python benchmarks/batches.py    # SmolLM2's size, 31 to some 150 tokens
    python benchmarks/batches.py --teacher models/llava-7b --data data/train.json
    python benchmarks/batches.py --teacher examples/easy_vqa/teacher --data T/train --map padding:fewer_turns

Each way is dumped in a process of its own: 16 samples per forward, as it was, and what the pilot finds.
"""

from __future__ import annotations

import json
import multiprocessing
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from cachekd.config import DumpConfig
from cachekd.data.loader import read_encoded
from cachekd.dump.pilot import planned_limits
from cachekd.dump.plan import estimate_of, new_plan, pilot_of
from cachekd.dump.run import open_inputs
from cachekd.dump.shards import groups_of
from cachekd.errors import BadSample
from cachekd.models.device import peak_memory, reset_peak, synchronize

WAYS: dict[str, dict[str, int]] = {"16 samples": {"batch_size": 16}, "padded tokens": {}}


def main(
    teacher: Annotated[str | None, typer.Option(help="A model folder; by default one is made.")] = None,
    data: Annotated[str | None, typer.Option(help="As for `cachekd dump`; by default some are made.")] = None,
    map: Annotated[str | None, typer.Option(help="As for `cachekd dump`.")] = None,
    samples: Annotated[int, typer.Option(help="How many.")] = 256,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if teacher is None:
            from smollm2_vlm import make_teacher

            teacher = str(make_teacher(folder / "teacher"))
        data = data or str(make_data(folder / "data", samples))
        results = {}
        for way, changes in WAYS.items():
            config = {"teacher": teacher, "data": data, "map": map, "limit": samples, "out": folder / "cache"}
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                results[way] = process.submit(measure, config | changes, threads).result()
    if as_json:
        print(json.dumps(results, indent=1))
        return
    for way, found in results.items():
        print(f"{way}: " + ", ".join(f"{name} {value:,}" for name, value in found.items()))


def measure(settings: dict[str, Any], threads: int) -> dict[str, float]:
    """All forwards of a dump, of its plan's batches, with what is kept of them, one after the other."""
    torch.set_num_threads(threads)
    config = DumpConfig(calibration_tokens=1, **settings)
    samples, teacher = open_inputs(config)
    pilot = pilot_of(config, samples, teacher, None, lambda samples, tokens: None)
    plan = new_plan(config, samples, teacher, pilot, estimate_of(config, samples, teacher, pilot))
    geometry, batches = plan.source.geometry, []
    limits = planned_limits(geometry)
    for group in (group for span in plan.spans() for group in groups_of(span, geometry)):
        read = read_encoded(samples, teacher.encoder, range(*group), workers=0)
        good = [sample for sample in read if not isinstance(sample, BadSample)]
        batches += [[good[i] for i in some] for some in limits.cut([len(sample) for sample in good])]
    reset_peak()
    # Of a CPU its own time: other programs have a part of every second.
    clock = time.process_time if teacher.model.device.type == "cpu" else time.perf_counter
    before, began = peak_memory(), clock()
    for batch in batches:
        teacher.run(batch)
    synchronize()
    seconds = clock() - began
    cells = [len(batch) * max(map(len, batch)) for batch in batches]
    tokens = [len(sample) for batch in batches for sample in batch]
    return {
        "forwards": len(batches),
        "most_padded_tokens": max(cells),
        "padding_share": round(1 - sum(tokens) / sum(cells), 3),
        "peak_mb": round(peak_memory() / 1e6),
        "peak_over_weights_mb": round((peak_memory() - before) / 1e6),
        "tokens_per_s": round(sum(tokens) / seconds),
        "least_tokens": min(tokens),
        "most_tokens": max(tokens),
    }


def make_data(folder: Path, samples: int) -> Path:
    """LLaVA JSON with answers of 1 to some 115 tokens, of the standard library's sources."""
    from smollm2_vlm import IMAGE_SIZE

    folder.mkdir()
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()
    noise = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "0.png")
    words = [word for word in text.split() if word.isalpha()]
    records = [
        {
            "id": f"s{number:06d}",
            "image": "0.png",
            "conversations": [
                {"from": "human", "value": "<image>\nGo on."},
                {"from": "gpt", "value": " ".join(words[number : number + 1 + number * 37 % 90])},
            ],
        }
        for number in range(samples)
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


if __name__ == "__main__":
    typer.run(main)
