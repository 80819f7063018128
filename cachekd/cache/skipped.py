"""skipped.jsonl: the samples of the data set that a cache lacks, and why."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from cachekd.atomic import RESTORE, commit, read_plain
from cachekd.cache.manifest import SkippedInfo
from cachekd.cache.plan import Skipped
from cachekd.errors import CachekdError

SKIPPED_FILE = "skipped.jsonl"
MOST_SKIPPED = 2**28  # bytes
MOST_LINES = 2**21  # samples


class SkippedSamples:
    """What is in the file, line by line: all in memory at once take some 700 bytes each."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._lines = content.count(b"\n")

    def __len__(self) -> int:
        return self._lines

    def __iter__(self) -> Iterator[Skipped]:
        # Not splitlines: a key may hold U+2028, which JSON leaves as it is.
        return (Skipped.model_validate_json(line, strict=True) for line in io.BytesIO(self._content))


def pack_skipped(skipped: Iterable[Skipped]) -> bytes:
    """The file's bytes: a line of JSON per sample."""
    content = io.BytesIO()
    content.writelines(f"{json.dumps(dict(sample), ensure_ascii=False)}\n".encode() for sample in skipped)
    return content.getvalue()


def skipped_info(skipped: list[Skipped] | SkippedSamples) -> SkippedInfo | None:
    """What the manifest says of the file; None where there is none."""
    if not skipped:
        return None
    content = pack_skipped(skipped)
    return SkippedInfo(samples=len(skipped), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_skipped(path: Path, skipped: list[Skipped] | SkippedSamples) -> None:
    """Write it into a cache's folder, if there is anything in it that is not there yet."""
    file, content = path / SKIPPED_FILE, pack_skipped(skipped)
    if skipped and not (file.exists() and file.read_bytes() == content):
        commit(file, content)


def read_skipped(path: Path, info: SkippedInfo | None) -> SkippedSamples:
    """The samples that were left out.

    Args:
        path: the cache.
        info: what its manifest says; None where no sample was left out.

    Raises:
        CachekdError: the file is missing, or is not the one that was written.
    """
    if info is None:
        return SkippedSamples(b"")
    try:
        content = read_plain(path / SKIPPED_FILE, min(info.bytes, MOST_SKIPPED))
    except OSError as error:
        raise _not_it(path, error.strerror or str(error)) from None
    found = hashlib.sha256(content).hexdigest()
    if found != info.sha256:
        raise _not_it(path, f"sha256 {found}, expected {info.sha256}")
    expected = f"expected {info.samples:,} in {info.bytes:,}"
    skipped = SkippedSamples(content)
    counts = (len(skipped), len(content))
    if counts != (info.samples, info.bytes) or len(skipped) > MOST_LINES or content[-1:] != b"\n":
        raise _not_it(path, f"{len(skipped):,} samples in {len(content):,} bytes, {expected}")
    try:
        for _ in skipped:
            pass
    except ValueError as error:
        raise _not_it(path, str(error)) from None
    return skipped


def _not_it(path: Path, found: str) -> CachekdError:
    return CachekdError(
        f"{SKIPPED_FILE} is not what was written",
        where=str(path / SKIPPED_FILE),
        found=found,
        fix=RESTORE,
    )
