"""Are the data that a step reads the ones that it read?

Cheap: they are read once, and again only if names, sizes or times of their files change.
"""

from __future__ import annotations

import hashlib
from glob import glob
from pathlib import Path

from pydantic import BaseModel

from cachekd.config import DataOptions
from cachekd.data import open_samples
from cachekd.data.open import content_hash, keys_hash
from cachekd.data.sources.urls import find_tars, is_remote, is_tar
from cachekd.paths import is_hub_data, split_query


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
    if is_remote(data.data) or is_hub_data(data.data):
        return None
    listing = _listing(_data_files(data.data))
    said = data.model_dump_json(include=set(DataOptions.model_fields), exclude_defaults=True)
    place = f"data {said}"
    if place not in known or known[place].listing != listing:
        samples = open_samples(data)
        content = hashlib.sha256(f"{keys_hash(samples)} {content_hash(samples)}".encode()).hexdigest()
        known[place] = Known(listing=listing, content=content)
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
