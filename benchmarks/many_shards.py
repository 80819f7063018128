"""What a cache's many samples and shards cost: opening, random reads, a missing key, memory of the commands.

python benchmarks/many_shards.py --json

Caches of made-up targets, four logprobs a token, written by `LogitCacheWriter`.
Everything is measured in a process of its own; `peak_mb` is its resident memory at the most.
"""

from __future__ import annotations

import json
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from apart import apart, printed_by, resident

from cachekd.cache import (
    CodecSettings,
    DataInfo,
    Fingerprints,
    LogitCache,
    LogitCacheWriter,
    TeacherInfo,
    TokenTargets,
)
from cachekd.errors import CachekdError
from cachekd_cli.main import app

VOCAB, KEPT, READS = 32_000, 4, 5_000
MIB = 2**20
COMMANDS = {
    "peek": ["peek", "CACHE", "--json"],
    "peek --order surprising": ["peek", "CACHE", "--order", "surprising", "--json"],
    "select --list": ["select", "CACHE", "--list"],
    "select --list --json": ["select", "CACHE", "--list", "--json"],
    "select --filter": ["select", "CACHE", "-o", "OUT", "--filter", "logprob > -1.5"],
    "inspect": ["inspect", "CACHE", "--json"],
    "verify": ["verify", "CACHE"],
    "recompress": ["recompress", "CACHE", "OUT", "--top-k", "2"],
    "export": ["export", "CACHE", "OUT", "--to", "parquet"],
}


def main(
    reading: Annotated[
        str, typer.Option(help="SAMPLESxSHARDS, separated by commas: opened and read at random.")
    ] = "300000x439,300000x6000",
    commands: Annotated[str, typer.Option(help="The same: for the memory of the commands.")] = (
        "100000x100,1000000x1000"
    ),
    tokens: Annotated[int, typer.Option(help="Answer tokens of a sample.")] = 2,
    only: Annotated[str, typer.Option(help="Commands whose name begins so.")] = "",
    folder: Annotated[
        Path | None, typer.Option(help="Where caches are kept for a second run; default: nowhere.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        kept = folder or Path(temporary)
        first = apart(made, kept, 1, 1, tokens)
        for samples, shards in sizes(reading):
            row = apart(read, apart(made, kept, samples, shards, tokens), first)
            rows.append({"samples": samples, "tokens": tokens, "shards": shards, **rounded(row)})
            print(rows[-1], file=sys.stderr)
        for samples, shards in sizes(commands):
            cache = apart(made, kept, samples, shards, tokens)
            for name, command in COMMANDS.items():
                if not name.startswith(only):
                    continue
                places = {"CACHE": str(cache), "OUT": str(Path(temporary) / f"{samples}-{name}")}
                row = apart(run, [places.get(part, part) for part in command])
                rows.append({"samples": samples, "tokens": tokens, "shards": shards, "command": name, **row})
                print(rows[-1], file=sys.stderr)
    if as_json:
        print(json.dumps(rows, indent=1))


def sizes(text: str) -> list[tuple[int, int]]:
    """From `300000x439,...`."""
    return [(int(a), int(b)) for a, _, b in (part.partition("x") for part in text.split(",") if part)]


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """For reading."""
    return {name: round(value, 3) for name, value in row.items()}


def read(path: Path, other: Path) -> dict[str, float]:
    """Open a cache, read at random, ask for a key that is not there."""
    LogitCache(other)["coco/train/00000000"]  # whatever is imported at first use
    before = resident("VmRSS")
    open_s, cache = timed(lambda: LogitCache(path))
    index_mb = (resident("VmRSS") - before) / MIB
    keys = [f"coco/train/{number:08d}" for number in range(len(cache))]
    chosen = random.Random(0).sample(keys, READS)
    reads_s, _ = timed(lambda: [cache[key] for key in chosen])
    missing_s, _ = timed(lambda: refused(cache, "coco/train/0000017"))
    return {
        "open_s": open_s,
        "index_mb": index_mb,
        "reads_s": reads_s,
        "missing_ms": 1000 * missing_s,
        "pickled_mb": len(pickle.dumps(cache)) / MIB,
    }


def refused(cache: LogitCache, key: str) -> None:
    """The key is not there, and that is said."""
    try:
        cache[key]
    except CachekdError:
        return
    raise SystemExit("the key is there")


def run(command: list[str]) -> dict[str, float]:
    """A command; what it prints is not wanted."""
    seconds, _ = timed(lambda: printed_by(app, command, standalone_mode=False))
    return {"peak_mb": round(resident("VmHWM") / MIB), "seconds": round(seconds, 1)}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def made(folder: Path, samples: int, shards: int, tokens: int) -> Path:
    """A cache of so many samples; what is there already is used again."""
    path = folder / f"{samples}x{shards}x{tokens}"
    if path.exists():
        return path
    teacher = TeacherInfo(
        name="none",
        model_type="llava",
        dtype="float32",
        vocab_size=VOCAB,
        weights_sha256="",
        config_sha256="",
    )
    prints = Fingerprints(tokenizer="", chat_template="", image_processor="", image_token="")
    each = -(-samples // shards)
    with LogitCacheWriter(
        path,
        teacher=teacher,
        fingerprints=prints,
        data=DataInfo(path="none", samples=samples, sha256=""),
        codec=CodecSettings(top_k=KEPT, top_p=0.9, window=KEPT, min_k=2),
        versions={},
        shard_tokens=tokens * each,
    ) as writer:
        numbers = iter(range(samples))
        for seed in count():
            some = list(islice(numbers, each))
            if not some:
                break
            parts = made_up(len(some) * tokens, seed).split([tokens] * len(some))
            for number, part in zip(some, parts, strict=True):
                writer.add(f"coco/train/{number:08d}", part, number.to_bytes(16, "big"))
    assert len(writer.manifest.shards) == shards, len(writer.manifest.shards)
    return path


def made_up(tokens: int, seed: int) -> TokenTargets:
    """Made up; no id twice in a token."""
    random = np.random.default_rng(seed)
    ids = (random.integers(VOCAB, size=(tokens, 1)) + 7 * np.arange(KEPT)) % VOCAB
    logprobs = np.log(np.sort(random.dirichlet(np.ones(KEPT + 1), tokens))[:, ::-1].astype(np.float32))
    k = np.full(tokens, KEPT, np.uint16)
    return TokenTargets(
        token_ids=ids[np.arange(tokens), random.integers(KEPT, size=tokens)].astype(np.uint32),
        k=k,
        knee=k,
        ids=ids.reshape(-1).astype(np.uint32),
        logprobs=np.ascontiguousarray(logprobs[:, :KEPT]).reshape(-1),
        tail_logmass=np.ascontiguousarray(logprobs[:, KEPT]),
    )


if __name__ == "__main__":
    typer.run(main)
