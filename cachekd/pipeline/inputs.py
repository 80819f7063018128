"""Are the files that a step reads the ones that it read?

Cheap: they are hashed once, and again only if their names, sizes or times change.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from pydantic import BaseModel

from cachekd.errors import CachekdError
from cachekd.fingerprint import weights_fingerprint
from cachekd.samples import open_samples
from cachekd.samples.open import content_hash, keys_hash
from cachekd.samples.tar_urls import is_remote

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OF_A_MODEL = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}


class Known(BaseModel):
    """What was found on the disk.

    Attributes:
        listing: sha256 over names, sizes and times; empty where there is nothing to list.
        content: sha256 over what counts.
    """

    listing: str
    content: str


def model_content(name: str, known: dict[str, Known]) -> str | None:
    """Which model this is: sha256 over the files that `from_pretrained` reads; None for a hub name.

    Args:
        known: what was found before, by what; it is kept up to date.

    Raises:
        CachekdError: there is no such folder, and it is no hub name.
    """
    folder = Path(name)
    if not folder.exists():
        if _HUB_NAME.fullmatch(name):
            return None
        raise CachekdError("there is no such model", where=name, expected="a model folder or hub name")
    files = _read_by_transformers(folder)
    listing = _listing(files)
    place = f"model {name}"
    if place not in known or known[place].listing != listing:
        names = "\n".join(path.name for path in files)
        content = hashlib.sha256(f"{names}\n{weights_fingerprint(files)}".encode()).hexdigest()
        known[place] = Known(listing=listing, content=content)
    return known[place].content


def _read_by_transformers(model: Path) -> list[Path]:
    if model.is_file():  # .gguf
        return [model]
    return sorted(
        path
        for path in model.iterdir()
        if path.suffix in _OF_A_MODEL and not path.name.startswith("cachekd_")  # what stages leave in a run
    )


def data_content(spec: str, map: str | None, known: dict[str, Known]) -> str | None:
    """Which data these are: their keys in order, and up to 32 samples; None for a URL or hub name.

    Raises:
        CachekdError: there are no such data on this disk.
    """
    path = Path(spec)
    if is_remote(spec) or (not path.exists() and _is_hub_name(spec)):
        return None
    listing = _listing(sorted(path.rglob("*")) if path.is_dir() else [path]) if path.exists() else ""
    place = f"data {spec} {map or ''}".rstrip()
    if place not in known or not listing or known[place].listing != listing:
        samples = open_samples(spec, map=map)
        content = hashlib.sha256(f"{keys_hash(samples)} {content_hash(samples)}".encode()).hexdigest()
        known[place] = Known(listing=listing, content=content)
    return known[place].content


def _is_hub_name(spec: str) -> bool:
    name = spec.partition("?")[0]
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).suffix


def _listing(files: list[Path]) -> str:
    lines = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files if path.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
