"""One shard in the making: coded as its samples come, written as a whole, read back, declared finished."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cachekd.atomic import commit
from cachekd.cache.build import CacheBuild
from cachekd.cache.fidelity import FidelitySample
from cachekd.cache.manifest import Fidelity, Header, ShardInfo
from cachekd.cache.plan import FinishedShard, Skipped
from cachekd.cache.shard import make_shard, pack_shard, samples_sha256
from cachekd.cache.shard_rules import require_different
from cachekd.cache.sparse_logits import TailStates, TokenTargets
from cachekd.cache.tail.encoder import OutputHead, SketchEncoder
from cachekd.errors import CachekdError

ENCODED_TOKENS = 4_096  # coded at a time


class ShardWriter:
    """Takes a shard's samples in their order; `finish` commits it.

    What it writes depends on the samples and on nothing before them, so a shard can be made again.

    Args:
        build: the cache.
        number: of the shard.
        span: of the data set that it covers; None where samples are added one by one.
        encoder: the tail sketch; None without one.
        head: the teacher's, to compare what is read back with it; None to leave that out.

    Attributes:
        halved: how often the teacher's batches were halved, as memory ran out.
    """

    def __init__(
        self,
        build: CacheBuild[Any],
        number: int,
        span: tuple[int, int] | None = None,
        *,
        encoder: SketchEncoder | None = None,
        head: OutputHead | None = None,
    ) -> None:
        self.build, self.number, self.span, self.tokens = build, number, span, 0
        self.halved = 0
        self._encoder, self._head = encoder, head
        self._compared = FidelitySample()
        self._uncoded: list[tuple[TokenTargets, TailStates]] = []
        self._uncoded_tokens = 0
        self._samples: list[tuple[str, bytes, int]] = []  # key, hash, tokens
        self._images: list[int | None] = []  # of each sample
        self._cut = 0
        self._coded: list[TokenTargets] = []
        self._skipped: list[Skipped] = []

    def add(
        self,
        key: str,
        targets: TokenTargets,
        content_hash: bytes,
        states: TailStates | None = None,
        images: int | None = None,
        cut: bool = False,
    ) -> None:
        """Add one sample; for arguments and errors see `LogitCacheWriter.add`.

        Args:
            images: how many it has; None: not known.
            cut: whether the end of its answers is left out.
        """
        plan, needs_states = self.build.plan, self._encoder is not None
        check_sample(key, targets, content_hash, states, plan, needs_states=needs_states)
        self._samples.append((key, content_hash, len(targets)))
        self._images.append(images)
        self._cut += cut
        if self._head is not None and states is not None:
            self._compared.add(self.tokens, states)
        self.tokens += len(targets)
        if self._encoder is None or states is None:
            self._coded.append(targets)
            return
        self._uncoded.append((targets, states))
        self._uncoded_tokens += len(targets)
        if self._uncoded_tokens >= ENCODED_TOKENS:
            self._encode()

    @property
    def skips(self) -> int:
        """How many samples were left out so far."""
        return len(self._skipped)

    def skip(self, key: str, reason: str) -> None:
        """Note a sample that is left out."""
        # A reason may quote a file name that is no valid text.
        text = reason.encode(errors="backslashreplace").decode()
        self._skipped.append(Skipped(key=key, reason=text))

    def finish(self) -> FinishedShard:
        """Commit the shard, compare what is on the disk with the teacher, then say that it is finished."""
        self._encode()
        note = FinishedShard(
            plan_sha256=str(self.build.plan.sha256),
            shard=self._commit() if self._samples else None,
            skipped=self._skipped,
        )
        self.build.finish_shard(self.number, note)
        return note

    def _encode(self) -> None:
        """Code the tails of what has come since the last time, in one go."""
        if self._encoder is None or not self._uncoded:
            return
        codes = self._encoder.encode(TailStates.concatenate([states for _, states in self._uncoded]))
        targets = TokenTargets.concatenate([targets for targets, _ in self._uncoded])
        self._coded.append(replace(targets, sketch=codes))
        self._uncoded, self._uncoded_tokens = [], 0

    def _commit(self) -> ShardInfo:
        targets = TokenTargets.concatenate(self._coded)
        shard = make_shard(self._samples, targets)
        codec, path = self.build.plan.codec, self.build.shard_path(self.number)
        content = pack_shard(shard, codec.logprob_step)
        commit(path, content)
        sha256 = hashlib.sha256(content).hexdigest()
        return ShardInfo(
            name=path.name,
            sketch=None if self._encoder is None else 0,
            span=self.span,
            samples=len(shard.keys),
            cut=self._cut,
            halved=self.halved,
            without_image=None if None in self._images else self._images.count(0),
            tokens=len(targets),
            entries=len(targets.ids),
            bytes=len(content),
            sha256=sha256,
            samples_sha256=samples_sha256(shard),
            fidelity=self._measure(path, sha256),
        )

    def _measure(self, path: Path, sha256: str) -> Fidelity | None:
        if self._head is None:
            return None
        plan = self.build.plan
        sketch = None if self._encoder is None else self._encoder.sketch
        try:
            return self._compared.measure(path, sha256, plan, self._head, sketch)
        except (MemoryError, torch.OutOfMemoryError):  # no reason to lose a good shard
            return None


def check_sample(
    key: str,
    targets: TokenTargets,
    content_hash: bytes,
    states: TailStates | None,
    header: Header,
    *,
    needs_states: bool,
) -> None:
    """Refuse a sample that the format cannot hold, or that no reader would take."""
    if "\n" in key or len(content_hash) != 16 or len(targets) == 0:
        raise CachekdError(
            "the sample cannot be stored",
            where=f"sample {key!r}",
            expected="a key without line breaks, a 16-byte hash and at least one answer token",
            found=f"{len(content_hash)} bytes and {len(targets)} tokens",
        )
    vocab_size, top_k = header.teacher.vocab_size, header.codec.top_k
    most_id = max(int(targets.token_ids.max()), int(targets.ids.max(initial=0)))
    if most_id >= vocab_size or not 1 <= targets.k.min() <= targets.k.max() <= top_k:
        raise CachekdError(
            "the sample does not fit the cache's settings",
            where=f"sample {key!r}",
            expected=f"ids below {vocab_size:,}, and 1 to {top_k:,} logprobs a token",
            found=f"ids up to {most_id:,}, and {targets.k.min():,} to {targets.k.max():,} logprobs",
            fix="pass the teacher's vocab_size, and the top_k with which the logprobs were selected",
        )
    try:
        require_different(targets.ids, targets.k)
    except ValueError as error:
        raise CachekdError(
            "the sample cannot be stored", where=f"sample {key!r}", expected="different ids", found=str(error)
        ) from None
    if needs_states and (states is None or len(states) != len(targets)):
        raise CachekdError(
            "a tail sketch needs the teacher's hidden states",
            where=f"sample {key!r}",
            expected=f"states of {len(targets)} tokens",
            found="none" if states is None else len(states),
        )
