"""The files of a published cache, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass

from cachekd.cache.build import SHARD_FOLDER
from cachekd.cache.manifest import Manifest
from cachekd.cache.skipped import SKIPPED_FILE

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


def listed_files(manifest: Manifest) -> list[Listed]:
    """All that a reader needs beside the manifest. A finished dump's plan and records are no part of it.

    The manifest's model has checked the names: they cannot lead out of a folder.
    """
    files = [Listed(f"{SHARD_FOLDER}/{info.name}", info.bytes, info.sha256) for info in manifest.shards]
    files += [Listed(info.name, info.bytes, info.sha256) for info in manifest.sketches]
    if manifest.skipped is not None:
        files.append(Listed(SKIPPED_FILE, manifest.skipped.bytes, manifest.skipped.sha256))
    return files
