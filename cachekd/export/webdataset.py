"""A cache as WebDataset tars: every sample, images and conversation, its cached targets beside it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np

from cachekd.atomic import commit
from cachekd.cache import LogitCache
from cachekd.data import Sample, Samples
from cachekd.errors import CachekdError, cannot_write
from cachekd.export.sparse import EXPORT_FILE, SparseTargets, export_header, open_cache
from cachekd.lock import staged_folder

TARGETS = "targets.npz"
Member = tuple[str, bytes]


def export_webdataset(
    cache: LogitCache | str | Path,
    out: str | Path,
    samples: Samples,
    *,
    top_k: int | None = None,
    progress: Callable[[int], None] = lambda samples: None,
) -> int:
    """Write `00000.tar` and so on, one per shard: all of them or none.

    A sample has `NAME.png` (or `NAME.0.png`, `NAME.1.png`, ...; lossless, as the teacher saw them),
    `NAME.json` with `id`, `messages` and, if there are some, `tools`, and `NAME.targets.npz` with the arrays
    of `SparseTargets`, which `np.load(..., allow_pickle=False)` reads. NAME is the sample's key, with what
    WebDataset would take for an extension or a path percent-encoded. `cachekd.data.open_samples` reads the
    tars as data.

    Args:
        cache: the folder, or an open cache.
        out: a new or empty folder.
        samples: the data that it was made from, in any order; it may hold more.
        top_k: most logprobs per token; None: all that are kept exactly.
        progress: is told the samples that were written since the last call.

    Returns:
        the number of samples.

    Raises:
        CachekdError: the data lack a sample or have another content, the cache is damaged or holds less than
            `top_k`, or `out` holds something.
    """
    cache = open_cache(cache, top_k)
    places = _places(cache, samples)
    written = 0
    with staged_folder(out, "export", last=EXPORT_FILE) as staging:
        for number in range(len(cache.manifest.shards)):
            file = staging / f"{number:05d}.tar"
            try:
                # GNU's format would cut long names, PAX keeps them.
                with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
                    for members in _samples(cache, number, samples, places, top_k):
                        for name, content in members:
                            info = tarfile.TarInfo(name)
                            info.size = len(content)
                            tar.addfile(info, io.BytesIO(content))
                        written += 1
                        progress(1)
            except OSError as error:
                raise cannot_write(file, error) from None
        commit(staging / EXPORT_FILE, json.dumps(export_header(cache, top_k), indent=2).encode())
    return written


def member_name(key: str) -> str:
    """A key as the name of a member, up to its extension.

    >>> member_name("coco/train.2017/17")
    'coco/train%2E2017/17'
    """
    whole = all(key.split("/"))  # no empty name in it
    return quote(key, safe="/ #" if whole else " #").replace(".", "%2E") or "%"


def _places(cache: LogitCache, samples: Samples) -> dict[str, int]:
    """Where in the data each of the cache's samples is."""
    places = {key: place for place, key in enumerate(samples.keys) if key in cache}
    found = {cache.place(key) for key in places}
    lost = [key for key in cache if cache.place(key) not in found]
    if lost:
        raise CachekdError(
            "the data lack samples of the cache",
            where=str(cache.path),
            expected=f"all of its {cache.manifest.samples:,} samples",
            found=f"{len(lost):,} are missing, the first is {lost[0]!r}",
            fix="give all data that were dumped, or take a part of the cache with `cachekd select`",
        )
    return places


def _samples(
    cache: LogitCache, number: int, samples: Samples, places: dict[str, int], top_k: int | None
) -> Iterator[list[Member]]:
    """Yield the members of each sample of a shard."""
    for key, content_hash, sparse in cache.shard_samples(number):
        if key not in places:  # of a bound cache: the data have the sample under another key
            continue
        sample = samples[places[key]]
        if sample.content_hash != content_hash:
            raise CachekdError(
                "the sample's text or image differs from the one that the teacher saw",
                where=sample.where,
                expected=f"content hash {content_hash.hex()}",
                found=sample.content_hash.hex(),
                fix="give the data that were dumped, or run `cachekd dump` again",
            )
        stream = io.BytesIO()
        arrays = SparseTargets.from_sparse(sparse, top_k).arrays()
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]  # numpy's stub has an option first
        name = member_name(key)
        yield [*_members(name, sample), (f"{name}.{TARGETS}", stream.getvalue())]


def _members(name: str, sample: Sample) -> Iterator[Member]:
    for number, image in enumerate(sample.images):
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        yield f"{name}.{number}.png" if len(sample.images) > 1 else f"{name}.png", stream.getvalue()
    record = {"id": sample.key, "messages": sample.messages}
    if sample.tools:
        record["tools"] = sample.tools
    yield f"{name}.json", json.dumps(record, ensure_ascii=False).encode()
