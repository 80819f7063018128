"""Open a data set by its path."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cachekd.errors import CachekdError
from cachekd.samples.llava_json import LlavaJsonSamples
from cachekd.samples.web_dataset import WebDatasetSamples

Samples = LlavaJsonSamples | WebDatasetSamples


def open_samples(path: str | Path) -> Samples:
    """Open LLaVA-style JSON (`.json`, `.jsonl`) or WebDataset tars (one `.tar`, or a folder of them).

    Raises:
        CachekdError: the path does not exist, holds none of these, or has no samples.
    """
    path = Path(path)
    if not path.exists():
        raise CachekdError("the data set does not exist", where=str(path))
    samples: Samples
    if path.suffix in (".json", ".jsonl"):
        samples = LlavaJsonSamples(path)
    else:
        tars = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []
        if not tars:
            raise CachekdError(
                "no data found",
                where=str(path),
                expected="a .json or .jsonl file in LLaVA's form, a .tar, or a folder of .tar files",
            )
        samples = WebDatasetSamples(tars)
    if len(samples) == 0:
        raise CachekdError("the data set is empty", where=str(path), expected="at least one sample", found=0)
    return samples


def keys_hash(samples: Samples) -> str:
    """sha256 over the keys in order: which samples a data set holds, not what is in them."""
    return hashlib.sha256("\n".join(samples.keys).encode()).hexdigest()
