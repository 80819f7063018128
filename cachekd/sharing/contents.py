"""The files of a published cache, and what is known of each."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from cachekd.cache.build import SHARD_FOLDER, mean_fidelity
from cachekd.cache.manifest import Manifest
from cachekd.cache.plan import SKIPPED_FILE
from cachekd.errors import CachekdError

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Listed:
    """A file that the manifest lists.

    Attributes:
        name: its path in the cache.
        bytes, sha256: of its content.
    """

    name: str
    bytes: int
    sha256: str


def listed(name: str, content: bytes) -> Listed:
    """What a manifest would list of a file with this content."""
    return Listed(name, len(content), hashlib.sha256(content).hexdigest())


def listed_files(manifest: Manifest) -> list[Listed]:
    """All that a reader needs beside the manifest. A finished dump's plan and records are no part of it.

    The manifest's model has checked the names: they cannot lead out of a folder.
    """
    files = [Listed(f"{SHARD_FOLDER}/{info.name}", info.bytes, info.sha256) for info in manifest.shards]
    files += [Listed(info.name, info.bytes, info.sha256) for info in manifest.sketches]
    if manifest.skipped is not None:
        files.append(Listed(SKIPPED_FILE, manifest.skipped.bytes, manifest.skipped.sha256))
    return files


def some_shards(manifest: Manifest, wanted: str, where: str) -> Manifest:
    """The manifest of a part. Shards keep their names, so that parts can be told apart and merged.

    Raises:
        CachekdError: it is no list of shards, or not of this cache.
    """
    count = len(manifest.shards)
    places: set[int] = set()
    for piece in wanted.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < count:
            raise CachekdError(
                "--shards is no list of this cache's shards",
                where=where,
                expected=f"numbers from 0 to {count - 1}, such as 0-9 or 0-3,7",
                found=wanted,
            )
        places |= set(range(first, last + 1))
    chosen = [info for place, info in enumerate(manifest.shards) if place in places]
    part = manifest.model_copy(update={"shards": chosen, "fidelity": mean_fidelity(chosen)})
    return Manifest.model_validate_json(part.to_json())  # with its own seal


def not_listed(where: str, expected: str, found: str) -> CachekdError:
    """What to tell of a published file that the manifest does not know so."""
    return CachekdError(
        "a published file is not the one that the manifest lists",
        where=where,
        expected=expected,
        found=found,
        fix="run the same command again; if it stays so, tell who published it: the files were changed",
    )
