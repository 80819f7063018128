"""Write a cache: shard by shard, each whole on disk before the next, the manifest last."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cachekd.cache.files import commit
from cachekd.cache.fit import OutputHead, SketchEncoder, fit_sketch
from cachekd.cache.manifest import (
    MANIFEST_FILE,
    CodecSettings,
    DataInfo,
    Fidelity,
    Fingerprints,
    Manifest,
    ShardInfo,
    SketchInfo,
    TeacherInfo,
)
from cachekd.cache.probes import Probes
from cachekd.cache.records import TailStates, TokenTargets
from cachekd.cache.shard import make_shard, pack_shard
from cachekd.cache.sketch import SKETCH_FILE, read_sketch
from cachekd.cache.tail import CALIBRATION_TOKENS, TailSetting
from cachekd.errors import CachekdError

SHARD_FOLDER = "shards"
ENCODED_TOKENS = 4_096  # coded at a time


@dataclass(frozen=True)
class _Uncoded:
    key: str
    content_hash: bytes
    targets: TokenTargets
    states: TailStates | None


class LogitCacheWriter:
    """Writes samples in the order in which they come.

    Use it as a context manager: on success the manifest is written, on an exception all that was written is
    removed, so that a folder holds a whole cache or none.

    The first `calibration_tokens` answer tokens wait in memory until the tail sketch has been fitted on them
    (all of them, if the cache is smaller).

    Args:
        path: the cache's folder; new or empty.
        teacher, fingerprints, data, codec, versions: what the manifest says.
        head: the teacher's output head; a tail sketch needs it.
        encoder: a sketch that is fitted already; without one it is fitted here.
        shard_tokens: answer tokens per shard, about; some 7 MB at 110 bytes per token.
        calibration_tokens: answer tokens that the sketch is fitted on.

    Raises:
        CachekdError: the folder holds something already, or a tail sketch is wanted and there is no head.
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
        head: OutputHead | None = None,
        encoder: SketchEncoder | None = None,
        shard_tokens: int = 65_536,
        calibration_tokens: int = CALIBRATION_TOKENS,
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
        self._codec, self._teacher, self._shard_tokens = codec, teacher, shard_tokens
        self._tail = TailSetting.parse(codec.tail)
        if self._tail.sketch and head is None and encoder is None:
            raise CachekdError(
                "a tail sketch needs the teacher's output head",
                where=f"setting 'tail': {codec.tail}",
                fix="pass head= or encoder=, or use --tail none",
            )
        if encoder is not None and not self._tail.sketch:
            raise CachekdError("a sketch is given, but the codec's tail is none", where=str(self.path))
        rows = {len(head.weight)} if head is not None else set()
        rows |= {encoder.sketch.vocab_size} if encoder is not None else set()
        if rows - {teacher.vocab_size}:
            raise CachekdError(
                "the output head does not fit the vocabulary",
                where=str(self.path),
                expected=f"{teacher.vocab_size} rows",
                found=", ".join(map(str, sorted(rows))),
                fix="cut the rows that pad the head beyond the tokenizer's tokens",
            )
        self._head, self._calibration_tokens = head, calibration_tokens
        self._encoder = encoder
        self._sketch: SketchInfo | None = None
        self._uncoded: list[_Uncoded] = []
        self._uncoded_tokens = 0
        self._probes = Probes()
        self._waiting: list[tuple[str, bytes, TokenTargets]] = []
        self._waiting_tokens = 0
        self._seen: dict[str, int] = {}
        self._shards: list[ShardInfo] = []
        self._made_folder = not self.path.exists()
        (self.path / SHARD_FOLDER).mkdir(parents=True)

    def add(
        self, key: str, targets: TokenTargets, content_hash: bytes, states: TailStates | None = None
    ) -> None:
        """Add one sample.

        Args:
            key: unique in the cache.
            targets: of its answer tokens, at least one.
            content_hash: 16 bytes that change with the sample.
            states: at the same tokens; a tail sketch needs them.

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
        if self._tail.sketch and (states is None or len(states) != len(targets)):
            raise CachekdError(
                "a tail sketch needs the teacher's hidden states",
                where=f"sample {key!r}",
                expected=f"states of {len(targets)} tokens",
                found="none" if states is None else len(states),
            )
        self._seen[key] = len(self._seen)
        if self._head is None and not self._tail.sketch:
            states = None  # of no use, and perhaps a GPU's memory
        self._uncoded.append(_Uncoded(key, content_hash, targets, states))
        self._uncoded_tokens += len(targets)
        if self._uncoded_tokens >= (ENCODED_TOKENS if self._encoder else self._calibration_tokens):
            self._encode()

    def close(self) -> None:
        """Write what is waiting, then the manifest.

        Raises:
            CachekdError: there was no sample.
        """
        if not self._seen:
            raise CachekdError("a cache needs at least one sample", where=str(self.path), found=0)
        self._encode()
        self._flush()
        parts = {**self._header, "sketch": self._sketch, "shards": self._shards}
        self._commit_manifest(parts)
        # The cache is whole from here on; whatever goes wrong with measuring it must not take it away.
        self._commit_manifest({**parts, "fidelity": self._measure()})

    def _commit_manifest(self, parts: dict[str, Any]) -> None:
        manifest = Manifest.model_validate(parts)
        commit(self.path / MANIFEST_FILE, manifest.to_json())
        self.manifest = manifest

    def __enter__(self) -> Self:
        try:
            if self._encoder is not None:
                self._commit_sketch(self._encoder)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if not (self.path / MANIFEST_FILE).exists():
                self._remove()

    def _encode(self) -> None:
        """Code the tails of what has come since the last time, in one go; the first time, fit the sketch."""
        samples, self._uncoded, self._uncoded_tokens = self._uncoded, [], 0
        counts = [len(sample.targets) for sample in samples]
        targets = [sample.targets for sample in samples]
        if self._tail.sketch and samples:
            states = TailStates.concatenate([s.states for s in samples if s.states is not None])
            together = TokenTargets.concatenate(targets)
            if self._encoder is None:
                assert self._head is not None  # as checked
                self._encoder = fit_sketch(self._head, states, together, self._tail)
            if self._sketch is None:
                self._commit_sketch(self._encoder)
            targets = replace(together, sketch=self._encoder.encode(states)).split(counts)
        for sample, coded in zip(samples, targets, strict=True):
            self._waiting.append((sample.key, sample.content_hash, coded))
            if self._head is not None:
                self._probes.offer(len(self._shards), self._waiting_tokens, sample.states)
            self._waiting_tokens += len(coded)
            if self._waiting_tokens >= self._shard_tokens:
                self._flush()

    def _commit_sketch(self, encoder: SketchEncoder) -> None:
        content = encoder.sketch.pack()
        commit(self.path / SKETCH_FILE, content)
        self._sketch = SketchInfo(
            axes=encoder.sketch.axes,
            step=encoder.step,
            calibration_tokens=encoder.calibration_tokens,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )

    def _flush(self) -> None:
        if not self._waiting:
            return
        shard = make_shard(self._waiting)
        content = pack_shard(shard, self._codec.logprob_step)
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

    def _measure(self) -> Fidelity | None:
        if self._head is None:
            return None
        shards = [self.path / SHARD_FOLDER / info.name for info in self._shards]
        sketch = read_sketch(self.path / SKETCH_FILE) if self._sketch is not None else None
        return self._probes.measure(shards, self._codec, self._teacher.vocab_size, self._head, sketch)

    def _remove(self) -> None:
        shutil.rmtree(self.path / SHARD_FOLDER, ignore_errors=True)
        (self.path / SKETCH_FILE).unlink(missing_ok=True)
        if self._made_folder:
            shutil.rmtree(self.path, ignore_errors=True)
