"""What a dump costs beside the teacher's bare forward over the same batches.

python benchmarks/dump_overhead.py --json

The teacher is SmolLM2-135M with a small random vision encoder (benchmarks/smollm2_vlm.py). Shard by shard, in
turns: the bare forward (inputs ready in memory, logits at the answer positions only; nothing kept), then
what `cachekd dump` does (read, encode, forward, select, sketch, pack, write, fsync, read back, compare).
`overhead` is the median of the shards' ratios of wall time. What is paid once per dump, the fit of the tail
sketch, is apart.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from cachekd.cache import TailSetting
from cachekd.cache.build import CacheBuild
from cachekd.config import DumpConfig
from cachekd.data.loader import read_encoded
from cachekd.dump.pilot import planned_limits
from cachekd.dump.plan import estimate_of, new_plan, pilot_of
from cachekd.dump.run import open_inputs
from cachekd.dump.shards import groups_of, make_shards
from cachekd.errors import BadSample


def main(
    samples: Annotated[int, typer.Option(help="How many; some 150 answer tokens each.")] = 256,
    shard_samples: Annotated[int, typer.Option(help="Samples per shard, the unit of comparison.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Samples per forward.")] = 8,
    tail: Annotated[str, typer.Option(help="As for `cachekd dump`.")] = "bytes=64",
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    models: Annotated[Path | None, typer.Option(help="Where the teacher is kept between runs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure."""
    from smollm2_vlm import make_data, make_teacher
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = DumpConfig(
            teacher=str(make_teacher((models or folder) / "smollm2-vlm")),
            data=str(make_data(folder / "data", samples)),
            out=folder / "cache",
            tail=tail,
            batch_size=batch_size,
            shard_samples=shard_samples,
            calibration_tokens=4096,
        )
        result = measure(config)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")


def measure(config: DumpConfig) -> dict[str, float | int | list[float]]:
    """Time both, shard by shard."""
    data, teacher = open_inputs(config)
    pilot = pilot_of(config, data, teacher, None, lambda samples, tokens: None)
    started = time.perf_counter()
    build = CacheBuild.start(
        config.out, new_plan(config, data, teacher, pilot, estimate_of(config, data, teacher, pilot))
    )
    encoder = build.encoder(lambda: pilot.fit(teacher)) if TailSetting.parse(config.tail).sketch else None
    fixed = time.perf_counter() - started
    geometry, spans = build.plan.source.geometry, build.plan.spans()
    limits = planned_limits(geometry)
    ratios, bare_seconds, dump_seconds, cpu_ratios = [], 0.0, 0.0, []
    for number, span in enumerate(spans):
        batches = []
        for group in groups_of(span, geometry):
            read = read_encoded(data, teacher.encoder, range(*group), workers=0)
            good = [sample for sample in read if not isinstance(sample, BadSample)]
            batches += [[good[i] for i in some] for some in limits.cut([len(sample) for sample in good])]
        begun, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            teacher.forward(batch)
        bare, bare_cpu = time.perf_counter() - begun, time.process_time() - cpu
        begun, cpu = time.perf_counter(), time.process_time()
        make_shards(
            build,
            [number],
            data,
            teacher,
            encoder,
            limits=limits,
            workers=0,
            on_error="stop",
            known={},
            progress=lambda samples, tokens: None,
        )
        whole, whole_cpu = time.perf_counter() - begun, time.process_time() - cpu
        ratios.append(whole / bare)
        cpu_ratios.append(whole_cpu / bare_cpu)
        bare_seconds, dump_seconds = bare_seconds + bare, dump_seconds + whole
    manifest = build.assemble(len(spans))
    return {
        "overhead": round(statistics.median(ratios), 4),
        "overhead_cpu": round(statistics.median(cpu_ratios), 4),
        "overheads": [round(ratio, 3) for ratio in ratios],
        "bare_s": round(bare_seconds, 2),
        "dump_s": round(dump_seconds, 2),
        "fixed_s": round(fixed, 2),
        "tokens": manifest.tokens,
        "tokens_per_s": round(manifest.tokens / dump_seconds, 1),
        "bytes_per_token": round(manifest.size / manifest.tokens, 1),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    typer.run(main)
