"""Which codec for a cache's numbers: bytes per token on real data, against their order-0 entropy.

    python benchmarks/array_codecs.py

The entropy is what an ideal coder with one table per array (per axis, for the sketch) would need; PCodec is
such a coder (tANS over bins). `--json` prints the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import LZMA, Blosc, Zstd
from numcodecs.pcodec import PCodec
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from cachekd.cache import CodecSettings, OutputHead
from cachekd.cache.codec import encode_logprobs, rank_ids
from cachekd.cache.roundtrip import fit_states, select_states

from smollm2 import load_states  # isort: skip

CODECS: dict[str, Callable[[NDArray], Any]] = {
    "zstd 1": lambda rows: Zstd(1),
    "zstd 19": lambda rows: Zstd(19),
    "blosc zstd 5 shuffle": lambda rows: Blosc("zstd", 5, Blosc.SHUFFLE, blocksize=rows.nbytes),
    "lzma": lambda rows: LZMA(),
    "pcodec": lambda rows: PCodec(equal_pages_up_to=rows.shape[-1]),
}


def entropy(rows: NDArray) -> float:
    """Order-0, row by row; bytes in all."""
    bits = 0.0
    for row in np.atleast_2d(rows):
        share = np.unique(row, return_counts=True)[1] / row.size
        bits -= row.size * float((share * np.log2(share)).sum())
    return bits / 8


def arrays(tail: str, saved: Path | None) -> tuple[int, dict[str, NDArray]]:
    """The number of tokens, and the large arrays of their shard."""
    states = load_states(saved)
    head = OutputHead(states.head)
    codec = CodecSettings(top_k=128, top_p=0.0, window=128, min_k=2, tail=tail)
    encoder = fit_states(head, states.calibration, codec)
    whole, records = select_states(head, states.teacher, states.token_ids, codec)
    ranked, ranks = rank_ids(records.ids)
    coordinates = np.ascontiguousarray(encoder.encode(whole).coordinates.T)
    return len(records), {
        f"sketch coordinates ({tail})": coordinates.astype(np.int8)
        if np.abs(coordinates).max() < 128
        else coordinates,
        "ids as they are": records.ids,
        "ids by frequency rank": ranks.astype(np.uint16),
        "the ids in that order": ranked,
        "logprob gaps": encode_logprobs(records.logprobs, records.k, codec.logprob_step),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", type=Path, help="keep the models' states here between runs")
    parser.add_argument("--tail", default="bytes=64")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokens, found = arrays(options.tail, options.states)
    rows = []
    for name, values in found.items():
        row: dict[str, Any] = {"array": name, "order-0 entropy": entropy(values) / tokens}
        for codec, make in CODECS.items():
            # PCodec has no 8-bit numbers; for the others small numbers are bytes, which suits them.
            given = values.astype(np.int16) if codec == "pcodec" and values.itemsize == 1 else values
            started = time.perf_counter()
            row[codec] = len(make(given).encode(given.reshape(-1))) / tokens
            row[f"{codec}, tokens/s"] = tokens / (time.perf_counter() - started)
        rows.append(row)
        print(f"coded {name}", file=sys.stderr)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("bytes per token", "order-0 entropy", *CODECS, title=f"{tokens:,} tokens of SmolLM2-135M")
    for row in rows:
        table.add_row(row["array"], f"{row['order-0 entropy']:.2f}", *(f"{row[name]:.2f}" for name in CODECS))
    speeds = (f"{rows[0][f'{name}, tokens/s']:,.0f}" for name in CODECS)
    table.add_row("tokens/s, sketch coordinates", "", *speeds)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
