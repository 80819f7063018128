"""Write a cache: shard by shard, each whole on disk before the next, the manifest last."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from cachekd.cache.files import commit
from cachekd.cache.manifest import (
    MANIFEST_FILE,
    CodecSettings,
    DataInfo,
    Fingerprints,
    Manifest,
    ShardInfo,
    TeacherInfo,
)
from cachekd.cache.records import TokenTargets
from cachekd.cache.shard import make_shard, pack_shard
from cachekd.errors import CachekdError

SHARD_FOLDER = "shards"


class LogitCacheWriter:
    """Writes samples in the order in which they come.

    Use it as a context manager: on success the manifest is written, on an exception all that was written is
    removed, so that a folder holds a whole cache or none.

    Args:
        path: the cache's folder; new or empty.
        teacher, fingerprints, data, codec, versions: what the manifest says.
        shard_tokens: answer tokens per shard, about; some 20 MB at 100 bytes per token.

    Raises:
        CachekdError: the folder holds something already.
    """

    manifest: Manifest
    """The manifest, once the cache is complete."""

    def __init__(
        self,
        path: str | Path,
        *,
        teacher: TeacherInfo,
        fingerprints: Fingerprints,
        data: DataInfo,
        codec: CodecSettings,
        versions: dict[str, str],
        shard_tokens: int = 200_000,
    ) -> None:
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise CachekdError(
                "the folder for the cache already holds something",
                where=str(self.path),
                expected="a new or empty folder: a cache is never overwritten",
                fix="choose another folder, or remove this one",
            )
        self._header = {
            "teacher": teacher,
            "fingerprints": fingerprints,
            "data": data,
            "codec": codec,
            "versions": versions,
        }
        self._step, self._shard_tokens = codec.logprob_step, shard_tokens
        self._waiting: list[tuple[str, bytes, TokenTargets]] = []
        self._waiting_tokens = 0
        self._seen: dict[str, int] = {}
        self._shards: list[ShardInfo] = []
        self._made_folder = not self.path.exists()
        (self.path / SHARD_FOLDER).mkdir(parents=True)

    def add(self, key: str, targets: TokenTargets, content_hash: bytes) -> None:
        """Add one sample.

        Args:
            key: unique in the cache.
            targets: of its answer tokens, at least one.
            content_hash: 16 bytes that change with the sample.

        Raises:
            CachekdError: the key came before or has a line break, or there is no answer token.
        """
        if key in self._seen:
            raise CachekdError(
                f"the key {key!r} appears twice",
                where=f"samples {self._seen[key]} and {len(self._seen)} of {self.path}",
                expected="keys that are unique in the data set",
            )
        if "\n" in key or len(content_hash) != 16 or len(targets) == 0:
            raise CachekdError(
                "the sample cannot be stored",
                where=f"sample {key!r}",
                expected="a key without line breaks, a 16-byte hash and at least one answer token",
                found=f"{len(content_hash)} bytes and {len(targets)} tokens",
            )
        self._seen[key] = len(self._seen)
        self._waiting.append((key, content_hash, targets))
        self._waiting_tokens += len(targets)
        if self._waiting_tokens >= self._shard_tokens:
            self._flush()

    def close(self) -> None:
        """Write what is waiting, then the manifest.

        Raises:
            CachekdError: there was no sample.
        """
        if not self._seen:
            raise CachekdError("a cache needs at least one sample", where=str(self.path), found=0)
        self._flush()
        manifest = Manifest.model_validate({**self._header, "shards": self._shards})
        commit(self.path / MANIFEST_FILE, manifest.to_json())
        self.manifest = manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        except BaseException:
            self._remove()
            raise
        if kind is not None:
            self._remove()

    def _flush(self) -> None:
        if not self._waiting:
            return
        shard = make_shard(self._waiting)
        content = pack_shard(shard, self._step)
        number = len(self._shards)
        info = ShardInfo(
            name=f"{number:05d}.zarr.zip",
            samples=len(shard.keys),
            tokens=len(shard.targets),
            entries=len(shard.targets.ids),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        commit(self.path / SHARD_FOLDER / info.name, content)
        # The sidecar is what a later run may believe of a shard when there is no manifest yet.
        sidecar = info.model_dump_json(indent=2) + "\n"
        commit(self.path / SHARD_FOLDER / f"{number:05d}.json", sidecar.encode())
        self._shards.append(info)
        self._waiting, self._waiting_tokens = [], 0

    def _remove(self) -> None:
        shutil.rmtree(self.path / SHARD_FOLDER, ignore_errors=True)
        if self._made_folder:
            shutil.rmtree(self.path, ignore_errors=True)
