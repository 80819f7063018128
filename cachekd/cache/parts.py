"""What the bytes of a shard are spent on."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

from cachekd.cache.arrays import damaged

CONTAINER = "container"
# By array; what is none of these is "other".
PARTS = {
    "ranked_ids": "ids",
    "topk_ranks": "ids",
    "topk_gaps": "logprobs",
    "k": "k",
    "beyond_knee": "k",
    "tail": "tail mass",
    "sketch_coordinates": "sketch codes",
    "sketch_shift": "sketch codes",
    "token_ids": "answer tokens",
    "sample_offsets": "keys and hashes",
    "sample_keys": "keys and hashes",
    "sample_hashes": "keys and hashes",
}


def bytes_by_part(path: Path) -> Counter[str]:
    """The compressed bytes of a shard's arrays by what they hold; together, the file's size.

    `container` is the rest: zip directory, Zarr metadata.

    Raises:
        CachekdError: it is not a zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        size = path.stat().st_size
    except (OSError, zipfile.BadZipFile) as error:
        raise damaged(path, str(error)) from None
    found: Counter[str] = Counter()
    for member in members:
        array, _, chunk = member.filename.partition("/c/")
        if chunk:
            found[PARTS.get(array, "other")] += member.compress_size
    found[CONTAINER] = size - found.total()
    return found
