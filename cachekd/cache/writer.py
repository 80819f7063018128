"""Write a cache from samples that come one by one, for example from a teacher of your own."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from cachekd.cache.build import CacheBuild
from cachekd.cache.manifest import CodecSettings, Fingerprints, Manifest, TeacherInfo
from cachekd.cache.plan import Plan
from cachekd.cache.shard_writer import ShardWriter, check_sample
from cachekd.cache.source import DataInfo, Source
from cachekd.cache.sparse_logits import TailStates, TokenTargets
from cachekd.cache.tail.encoder import OutputHead, SketchEncoder
from cachekd.cache.tail.fit import fit_sketch
from cachekd.cache.tail.setting import TailSetting
from cachekd.cache.vocabulary import pack_vocabulary
from cachekd.config.fields import CALIBRATION_TOKENS
from cachekd.errors import CachekdError
from cachekd.lock import alone, require_new_folder
from cachekd.paths import MANIFEST_FILE
from cachekd.vocabulary import TokenBytes


class _Sample(NamedTuple):
    key: str
    targets: TokenTargets
    content_hash: bytes
    states: TailStates | None


class LogitCacheWriter:
    """Writes samples in the order in which they come.

    Use it as a context manager. On success the manifest is written; on an exception everything that was
    written is removed. So a folder holds a whole cache or none. (Unlike a dump, this cannot be continued,
    because it does not know which samples are to come.)

    The first `calibration_tokens` answer tokens wait in memory until the tail sketch has been fitted on them
    (all of them, if the cache is smaller).

    Args:
        path: the cache's folder; new or empty.
        teacher, fingerprints, data, codec, versions: what the manifest says.
        head: the teacher's output head; a tail sketch needs it.
        encoder: a sketch that is fitted already; without one it is fitted here.
        vocabulary: what the teacher's token ids stand for; None: the cache does not say it.
        shard_tokens: answer tokens per shard, about; some 7 MB at 110 bytes per token.
        calibration_tokens: answer tokens that the sketch is fitted on.

    Raises:
        CachekdError: the folder holds something already, or another process writes into it; or a tail sketch
            is wanted and there is no head, or the vocabulary has fewer ids than the teacher.
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
        vocabulary: TokenBytes | None = None,
        shard_tokens: int = 65_536,
        calibration_tokens: int = CALIBRATION_TOKENS,
    ) -> None:
        self.path = Path(path)
        self._tail = TailSetting.parse(codec.tail)
        check_sketch_parts(self._tail, teacher.vocab_size, head, encoder, str(self.path))
        self._head, self._encoder = head, encoder
        self._shard_tokens, self._calibration_tokens = shard_tokens, calibration_tokens
        self._waiting: list[_Sample] = []  # for the sketch
        self._waiting_tokens = 0
        self._seen: dict[str, int] = {}
        self._made_folder = not self.path.exists()
        table = None if vocabulary is None else pack_vocabulary(vocabulary, teacher.vocab_size)
        plan = Plan(
            teacher=teacher,
            fingerprints=fingerprints,
            codec=codec,
            vocabulary=None if table is None else table.info,
            source=Source(data=data, versions=versions),
        )
        with ExitStack() as held:
            held.enter_context(alone(self.path, "writes a cache into"))
            require_new_folder(self.path, "cache")
            self._build = CacheBuild.start(self.path, plan)
            self._build.keep_vocabulary(lambda: table)
            self._held = held.pop_all()  # until the cache is complete, or given up
        self._shards, self._shard = 0, None if self._tail.sketch else self._new_shard(0)

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
            CachekdError: the key came before or has a line break, there is no answer token, a token has an
                id twice, or an id or a number of logprobs is beyond what teacher and codec say.
        """
        if key in self._seen:
            raise CachekdError(
                f"the key {key!r} appears twice",
                where=f"samples {self._seen[key]} and {len(self._seen)} of {self.path}",
                expected="keys that are unique in the data set",
            )
        sample = _Sample(key, targets, content_hash, states)
        if self._shard is not None:
            self._shard = self._added(self._shard, sample)  # which checks it
        else:
            check_sample(key, targets, content_hash, states, self._build.plan, needs_states=self._tail.sketch)
            self._waiting.append(sample)
            self._waiting_tokens += len(targets)
        self._seen[key] = len(self._seen)
        if self._shard is None and self._waiting_tokens >= self._calibration_tokens:
            self._shard = self._start_sketch()

    def close(self) -> None:
        """Write what is waiting, then the manifest.

        Raises:
            CachekdError: there was no sample.
        """
        if not self._seen:
            raise CachekdError("a cache needs at least one sample", where=str(self.path), found=0)
        shard = self._shard or self._start_sketch()
        if shard.tokens:
            shard.finish()
            self._shards += 1
        self.manifest = self._build.assemble(self._shards)
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if not (self.path / MANIFEST_FILE).exists():
                shutil.rmtree(self.path, ignore_errors=True)
                if not self._made_folder:
                    self.path.mkdir(exist_ok=True)  # another process may begin there now
            self._held.close()

    def _start_sketch(self) -> ShardWriter:
        """Fit it on what waits, which begins the first shards; returns the one that is not full."""
        waiting, self._waiting = self._waiting, []
        if self._encoder is None:
            assert self._head is not None  # as checked
            states = TailStates.concatenate([s.states for s in waiting if s.states is not None])
            targets = TokenTargets.concatenate([sample.targets for sample in waiting])
            self._encoder = fit_sketch(self._head, states, targets, self._tail)
        encoder = self._encoder
        self._encoder = self._build.encoder(lambda: encoder)
        shard = self._new_shard(0)
        for sample in waiting:
            shard = self._added(shard, sample)
        return shard

    def _new_shard(self, number: int) -> ShardWriter:
        return ShardWriter(self._build, number, encoder=self._encoder, head=self._head)

    def _added(self, shard: ShardWriter, sample: _Sample) -> ShardWriter:
        """The shard that takes the next sample."""
        shard.add(*sample)
        if shard.tokens < self._shard_tokens:
            return shard
        shard.finish()
        self._shards += 1
        return self._new_shard(self._shards)


def check_sketch_parts(
    tail: TailSetting, vocab_size: int, head: OutputHead | None, encoder: SketchEncoder | None, where: str
) -> None:
    """Refuse a head or a sketch that is missing, needless, or of another vocabulary."""
    if tail.sketch and head is None and encoder is None:
        raise CachekdError(
            "a tail sketch needs the teacher's output head",
            where=where,
            fix="pass head= or encoder=, or use --tail none",
        )
    if encoder is not None and not tail.sketch:
        raise CachekdError("a sketch is given, but the codec's tail is none", where=where)
    rows = {len(head.weight)} if head is not None else set()
    rows |= {encoder.sketch.vocab_size} if encoder is not None else set()
    if rows - {vocab_size}:
        raise CachekdError(
            "the output head does not fit the vocabulary",
            where=where,
            expected=f"{vocab_size} rows",
            found=", ".join(map(str, sorted(rows))),
            fix="cut the rows that pad the head beyond the tokenizer's tokens",
        )
