"""Peak memory of a dump as the data set grows: flat, or something keeps what it should let go.

python benchmarks/dump_memory.py --json

The demo's teacher over easy-VQA, one question a sample, repeated under new keys up to 50,000 samples in tars
of 5,000. Every size in a process of its own; `peak_mb` is its resident memory at the most.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import webdataset
from apart import apart, resident

from cachekd.config import DumpConfig
from cachekd.dump import dump

EXAMPLE = Path(__file__).parents[1] / "examples" / "easy_vqa"
PER_TAR = 5_000


def main(
    sizes: Annotated[str, typer.Option(help="Samples, separated by commas.")] = "1000,5000,20000,50000",
    shard_samples: Annotated[int, typer.Option(help="Per shard, the same for every size.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure."""
    counts = [int(size) for size in sizes.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "data", max(counts))
        for count in counts:
            config = DumpConfig(
                teacher=str(EXAMPLE / "teacher"),
                data=str(folder / "data"),
                out=folder / f"cache-{count}",
                limit=count,
                shard_samples=shard_samples,
                batch_size=32,
                calibration_tokens=1000,
            )
            rows.append(apart(measure, config))
            if not as_json:
                print(rows[-1])
    if as_json:
        print(json.dumps(rows, indent=1))


def measure(config: DumpConfig) -> dict[str, Any]:
    """A dump, its memory and its pace."""
    torch.set_num_threads(1)
    summary = dump(config)
    return {
        "samples": summary.samples,
        "tokens": summary.tokens,
        "shards": summary.shards,
        "peak_mb": round(resident("VmHWM") / 2**20, 1),
        "tokens_per_s": round(summary.tokens / summary.seconds, 1),
    }


def write_data(folder: Path, count: int) -> None:
    """Tars of `count` samples."""
    folder.mkdir()
    samples = enumerate(islice(cycle(easy_vqa_samples()), count))
    for number in range(-(-count // PER_TAR)):
        with webdataset.TarWriter(str(folder / f"{number:03d}.tar"), mtime=0) as tar:
            for index, (png, turns) in islice(samples, PER_TAR):
                tar.write({"__key__": f"{index:06d}", "png": png, "json": {"conversations": turns}})


def easy_vqa_samples() -> Iterator[tuple[bytes, list[dict[str, str]]]]:
    """An image and one question."""
    import easy_vqa

    paths = easy_vqa.get_train_image_paths()
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        yield Path(paths[image]).read_bytes(), turns


if __name__ == "__main__":
    typer.run(main)
