"""A cache as Parquet tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from cachekd.atomic import commit, make_folder
from cachekd.cache import LogitCache
from cachekd.errors import cannot_write
from cachekd.export.sparse import EXPORT_FILE, export_header, open_cache, ragged
from cachekd.lock import staged_folder

_ROWS = 1_000  # of a row group: what a reader has in memory at least
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("content_hash", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("topk_ids", pa.list_(pa.list_(pa.int32()))),
        ("topk_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("tail_logmass", pa.list_(pa.float32())),
    ]
)


def export_parquet(
    cache: LogitCache | str | Path,
    out: str | Path,
    *,
    top_k: int | None = None,
    progress: Callable[[int], None] = lambda samples: None,
) -> int:
    """Write `data/train-00000-of-00003.parquet` and so on, one file per shard: all of them or none.

    `datasets.load_dataset(out)` reads the folder. Columns, a row per sample: `key`; `content_hash`, of the
    sample that the teacher saw; over its N answer tokens `token_ids` [N], `topk_ids` and `topk_logprobs` (N
    lists of length k) in descending probability, `tail_logmass` [N], log of the probability that is not in
    the lists. The logprobs are normalised over the whole vocabulary.

    Args:
        cache: the folder, or an open cache.
        out: a new or empty folder.
        top_k: most logprobs per token; None: all that are kept exactly.
        progress: is told the samples that were written since the last call.

    Returns:
        the number of rows.

    Raises:
        CachekdError: the cache is damaged or holds less than `top_k`, or `out` holds something.
    """
    cache = open_cache(cache, top_k)
    header = json.dumps(export_header(cache, top_k), indent=2)
    shards, rows = len(cache.manifest.shards), 0
    with staged_folder(out, "export", last=EXPORT_FILE) as staging:
        make_folder(staging / "data")
        for number in range(shards):
            file = staging / "data" / f"train-{number:05d}-of-{shards:05d}.parquet"
            for written in _write(file, header, _rows(cache, number, top_k)):
                rows += written
                progress(written)
        commit(staging / EXPORT_FILE, header.encode())
    return rows


def _rows(cache: LogitCache, number: int, top_k: int | None) -> Iterator[dict[str, Any]]:
    for key, content_hash, sparse in cache.shard_samples(number):
        yield {"key": key, "content_hash": content_hash.hex(), **ragged(sparse, top_k)}


def _write(file: Path, header: str, rows: Iterator[dict[str, Any]]) -> Iterator[int]:
    """Row group by row group; says how many rows each had."""
    try:
        with pq.ParquetWriter(file, SCHEMA.with_metadata({"cachekd": header}), compression="zstd") as writer:
            while group := [row for row, _ in zip(rows, range(_ROWS), strict=False)]:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                yield len(group)
    except OSError as error:
        raise cannot_write(file, error) from None
