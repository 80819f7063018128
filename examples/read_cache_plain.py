"""Read a cache without cachekd, by zarr (with numcodecs[pcodec]), numpy and json: docs/reference/format.md.

python read_cache_plain.py CACHE [KEY]
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import zarr

warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")


def read_arrays(path: Path) -> dict[str, Any]:
    """Every array of a shard, of a sketch or of the vocabulary."""
    with zarr.storage.ZipStore(path, mode="r") as store:
        return {name: array[...] for name, array in zarr.open_group(store, mode="r").arrays()}


def kept_entries(shard: dict[str, Any], step: float) -> tuple[Any, Any, Any]:
    """Flat ids and logprobs of all tokens' entries, and each token's log mass that is not among them."""
    k = shard["k"].astype(int)
    odds = np.where(shard["tail"] == -(2**15), -np.inf, shard["tail"] / 32)
    logprobs, first = [], 0
    for count, kept in zip(k, -np.logaddexp(0, odds), strict=True):
        values = -step * np.cumsum(shard["topk_gaps"][first : first + count].astype(np.int64))
        logprobs.append(values + kept - np.logaddexp.reduce(values))
        first += count
    return shard["ranked_ids"][shard["topk_ranks"]], logprobs, -np.logaddexp(0, -odds)


def sketched_row(sketch: dict[str, Any], code: Any, shift: int) -> Any:
    """[V] float64, a token's logprobs at every id, as the tail sketch has them."""
    size, y = np.abs(code.astype(int)), np.abs(code.astype(int)) * sketch["unit"]
    for magnitude, centroid in enumerate(sketch["centroids"], 1):
        y = np.where(size == magnitude, centroid, y)
    basis = (sketch["basis"].astype(np.float32) * np.float32(sketch["basis_step"][0])).astype(np.float16)
    logits = (np.sign(code) * y) @ basis.astype(float) + sketch["offset"]
    for cap in sketch["softcap"]:  # one or none
        logits = cap * np.tanh(logits / cap)
    return logits - shift / 32


def read_sample(folder: Path, key: str) -> tuple[Any, Any]:
    """Answer tokens [N] and the teacher's logprobs [N, V] float64 at every id."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if manifest["format_version"] != 1:
        raise ValueError(f"format_version {manifest['format_version']}, expected 1")
    vocab_size = manifest["teacher"]["vocab_size"]
    for info in manifest["shards"]:
        shard = read_arrays(folder / "shards" / info["name"])
        keys = shard["sample_keys"].tobytes().decode().split("\n")
        if key not in keys:
            continue
        first, last = shard["sample_offsets"][keys.index(key) :][:2].astype(int)
        ids, logprobs, tail = kept_entries(shard, manifest["codec"]["logprob_step"])
        starts = np.concatenate([[0], np.cumsum(shard["k"], dtype=int)])
        rows = np.empty((last - first, vocab_size))
        if info["sketch"] is not None:
            sketch = read_arrays(folder / manifest["sketches"][info["sketch"]]["name"])
        for row, token in zip(rows, range(first, last), strict=True):
            if info["sketch"] is None:
                row[:] = tail[token] - np.log(max(vocab_size - int(shard["k"][token]), 1))
            else:
                row[:] = sketched_row(
                    sketch, shard["sketch_coordinates"][:, token], shard["sketch_shift"][token]
                )
            row[ids[starts[token] : starts[token + 1]]] = logprobs[token]
        return shard["token_ids"][first:last], rows
    raise KeyError(key)


def read_vocabulary(folder: Path) -> list[bytes] | None:
    """The bytes that each token id stands for; None where the cache does not say it."""
    info = json.loads((folder / "manifest.json").read_bytes()).get("vocabulary")
    if info is None:
        return None
    arrays = read_arrays(folder / info["name"])
    text, ends = arrays["contents"].tobytes(), np.cumsum(arrays["lengths"], dtype=int)
    return [text[end - size : end] for end, size in zip(ends, arrays["lengths"].astype(int), strict=True)]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    first_shard = json.loads((path / "manifest.json").read_bytes())["shards"][0]["name"]
    some_key = read_arrays(path / "shards" / first_shard)["sample_keys"].tobytes().decode().split("\n")[0]
    tokens, all_logprobs = read_sample(path, sys.argv[2] if len(sys.argv) > 2 else some_key)
    names = read_vocabulary(path) or range(all_logprobs.shape[1])
    for token_id, values in zip(tokens, all_logprobs, strict=True):
        best = np.argsort(-values)[:5]
        print(names[token_id], " ".join(f"{names[i]}:{values[i]:.3f}" for i in best))
