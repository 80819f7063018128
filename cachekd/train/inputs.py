"""The contents of what a run reads: a run that is resumed reads the same."""

from __future__ import annotations

import hashlib
from glob import glob
from pathlib import Path

from pydantic import BaseModel

from cachekd.cache.compare import identity
from cachekd.check.bind import Binding
from cachekd.config import DataOptions, TrainConfig
from cachekd.data import Samples, open_samples
from cachekd.data.open import content_hash, keys_hash
from cachekd.data.sources.tars import find_tars, is_tar
from cachekd.paths import is_url, split_query
from cachekd.train.open import OpenRun


def inputs_of(config: TrainConfig, opened: OpenRun) -> dict[str, str]:
    """sha256 of each input, by the name of its setting.

    Of data: the keys in order, and up to 32 samples unless they would have to be fetched. Of models: all
    files that are read, or the hub's commit; of a teacher behind a cache nothing, as the cache knows whose
    it is.

    Raises:
        CachekdError: the data cannot be read.
    """
    found: dict[str, str] = {}
    if opened.cache is not None:
        found["cache"] = identity(opened.cache.manifest)
    if config.binding is not None:
        found["binding"] = Binding.read(config.binding).identity
    found["data"] = _data(config.data, opened.samples)
    if config.eval_data is not None and opened.held_out is not None:
        found["eval_data"] = _data(config.eval_data.data, opened.held_out.samples)
        if opened.held_out.cache is not None:
            found["eval_cache"] = identity(opened.held_out.cache.manifest)
    found["student"] = opened.models.student.content
    if opened.models.teacher is not None and opened.cache is None:
        found["teacher"] = opened.models.teacher.content
    return found


def _data(spec: str, samples: Samples) -> str:
    """Hash the keys in order, and up to 32 samples unless they would have to be fetched."""
    content = "" if is_url(str(spec)) else content_hash(samples)
    return hashlib.sha256(f"{keys_hash(samples)} {content}".encode()).hexdigest()


class Known(BaseModel):
    """What was found on the disk.

    Attributes:
        listing: sha256 over names, sizes and times; empty where there is nothing to list.
        content: sha256 over what counts.
    """

    listing: str
    content: str


def data_content(data: DataOptions, known: dict[str, Known]) -> str | None:
    """Which data these are: their keys in order, and up to 32 samples; None for a URL or hub name.

    Args:
        known: what was found before, by what; it is kept up to date.

    Raises:
        CachekdError: there are no such data on this disk.
    """
    if not data.is_local:
        return None
    listing = _listing(_data_files(data.data))
    said = data.model_dump_json(include=set(DataOptions.model_fields), exclude_defaults=True)
    place = f"data {said}"
    if place not in known or known[place].listing != listing:
        known[place] = Known(listing=listing, content=_data(data.data, open_samples(data)))
    return known[place].content


def _data_files(spec: str) -> list[Path]:
    path = Path(split_query(spec)[0])
    if path.is_dir():
        return sorted(path.rglob("*"))
    if path.exists():
        return [path]
    return [Path(name) for name in (find_tars(spec) if is_tar(spec) else sorted(glob(spec, recursive=True)))]


def _listing(files: list[Path]) -> str:
    lines = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files if path.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
