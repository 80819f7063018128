"""What a dump will cost, and the settings that fit a disk budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import torch

from cachekd.cache import CodecSettings, TailSetting, TokenTargets
from cachekd.cache.manifest import VocabularyInfo
from cachekd.cache.shard import make_shard, pack_shard
from cachekd.cache.tail.encoder import SketchEncoder
from cachekd.cache.topk import default_top_p
from cachekd.data.spread import evenly
from cachekd.dump.batching import SHARD_TOKENS
from cachekd.dump.pilot import Pilot, planned_limits
from cachekd.dump.teacher import Teacher
from cachekd.errors import CachekdError
from cachekd.models.device import peak_memory


@dataclass(frozen=True)
class Estimate:
    """What the whole dump will be like.

    Attributes:
        tokens: answer tokens.
        tokens_error: one standard error of that.
        bytes_per_token: of the shards.
        shard_bytes, sketch_bytes: on the disk.
        vocabulary: what the manifest will say of it; None: the cache has none.
        limits: of a batch, in words.
        forwards: of the teacher, in all.
        seconds: with this process alone.
        peak_memory: bytes; of the GPU if there is one, else of the process.
    """

    samples: int
    tokens: int
    tokens_error: int
    bytes_per_token: float
    shard_bytes: int
    sketch_bytes: int
    vocabulary: VocabularyInfo | None
    limits: str
    forwards: int
    seconds: float
    peak_memory: int
    codec: CodecSettings

    @property
    def size(self) -> int:
        """Bytes of the cache."""
        return self.shard_bytes + self.sketch_bytes + self.vocabulary_bytes

    @property
    def vocabulary_bytes(self) -> int:
        """Bytes of the vocabulary's file."""
        return 0 if self.vocabulary is None else self.vocabulary.bytes

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens, with this process alone."""
        return self.tokens / max(1e-9, self.seconds)


def estimate(
    pilot: Pilot,
    teacher: Teacher,
    codec: CodecSettings,
    samples: int,
    shard_samples: int | None = None,
    workers: int = 0,
    vocabulary: VocabularyInfo | None = None,
) -> Estimate:
    """What a dump will cost.

    Args:
        codec: to be used; the pilot may have had a larger top_k.
        samples: of the data set.
        shard_samples: per shard; None for SHARD_TOKENS answer tokens.
        workers: processes that read samples.
        vocabulary: the one that the cache will have; it is counted.
    """
    encoder = pilot.fit(teacher, codec) if TailSetting.parse(codec.tail).sketch else None
    counts = torch.tensor(pilot.tokens, dtype=torch.float64)
    usable = samples * len(counts) / (len(counts) + len(pilot.bad))
    error = float(counts.std(correction=0)) * (max(0.0, 1 - len(counts) / samples) / len(counts)) ** 0.5
    tokens = round(usable * float(counts.mean()))
    shard_tokens = SHARD_TOKENS if shard_samples is None else shard_samples * float(counts.mean())
    shard_bytes = _shard_bytes(pilot, codec, encoder, tokens, shard_tokens)
    # By batches, not by samples: short ones have more samples to a batch.
    forwards = usable * pilot.batches / len(counts)
    run = pilot.run_seconds / pilot.batches_run
    read = pilot.read_seconds / (len(counts) + len(pilot.bad)) / max(1, workers)
    return Estimate(
        samples=samples,
        tokens=tokens,
        tokens_error=round(usable * error),
        bytes_per_token=shard_bytes / tokens,
        shard_bytes=round(shard_bytes),
        sketch_bytes=len(encoder.pack()) if encoder is not None else 0,
        vocabulary=vocabulary,
        limits=str(planned_limits(pilot.geometry)),
        forwards=ceil(forwards),
        seconds=max(forwards * run, usable * read),  # they overlap
        peak_memory=peak_memory(),
        codec=codec,
    )


def _shard_bytes(
    pilot: Pilot, codec: CodecSettings, encoder: SketchEncoder | None, tokens: int, shard_tokens: float
) -> float:
    """Extrapolate the bytes of `tokens` tokens in shards of `shard_tokens`.

    Tables and rare ids weigh more in a small shard. So the pilot's own tokens are packed, as many as a shard
    has if there are so many and half of that, and what lies beyond is on their line.
    """
    targets = pilot.targets.truncate(codec.top_k)
    if encoder is not None:
        targets = replace(targets, sketch=encoder.encode(pilot.states))
    whole = min(1.0, shard_tokens / len(targets))
    less, small = _packed(pilot, targets, whole / 2, codec.logprob_step)
    more, large = _packed(pilot, targets, whole, codec.logprob_step)
    rate = (large - small) / (more - less) if more > less else large / more
    shards = max(1.0, tokens / shard_tokens)
    return shards * (large - rate * more) + (rate + (encoder.surplus if encoder else 0.0)) * tokens


def _packed(pilot: Pilot, targets: TokenTargets, share: float, step: float) -> tuple[int, int]:
    """Tokens and bytes of a shard with a share of the pilot's samples.

    Args:
        targets: of all of them.
        step: nats, of the logprobs that are kept.
    """
    samples = [(answer.key, answer.content_hash, len(answer.targets)) for answer in pilot.answers.values()]
    parts = targets.split([tokens for _, _, tokens in samples])
    # Every so manieth sample, so that shards of two sizes both have some of everything.
    chosen = evenly(list(range(len(samples))), max(1, round(share * len(samples))), 0)
    some = TokenTargets.concatenate([parts[index] for index in chosen])
    shard = make_shard([samples[index] for index in chosen], some)
    return len(shard.targets), len(pack_shard(shard, step))


SHIFT_BYTES = 1.5  # per token, about, of the sketch's shift
LEAST_SKETCH = 8  # bytes per token; below that the same bytes do more in the top-k
ALL_THAT_BYTES_BUY = "bytes=4096"  # no sketch needs as much: what bytes buy ends at BUDGET_NOISE
BUDGET_USED = 0.97  # the pilot may be off by a few percent
LEAST_TOP_K = 4  # that a disk budget may choose


def fit_budget(cost: Callable[[CodecSettings], Estimate], codec: CodecSettings, budget: int) -> Estimate:
    """The setting that makes the most of `budget` bytes for the whole cache.

    The frontier that was measured (docs/explanation/what-the-cache-keeps.md): Kneedle's k and as fine a
    sketch as there is room for; smaller k only where nothing else is left, no sketch where it would not pay
    for its basis.

    Args:
        cost: of a codec.
        codec: top_k and top_p give way, and so does the tail; but none stays none.

    Raises:
        CachekdError: not even the smallest setting fits.
    """
    room = int(BUDGET_USED * budget)
    found = None
    if TailSetting.parse(codec.tail).sketch:
        found = _largest_top_k(
            codec.top_k,
            lambda top_k: _finest(cost, codec.model_copy(update={"top_k": top_k, "top_p": 0.0}), room),
        )
    plain = _with_tail(codec, "none").model_copy(update={"top_p": default_top_p(TailSetting.parse("none"))})

    def without_sketch(top_k: int) -> Estimate | None:
        estimated = cost(plain.model_copy(update={"top_k": top_k}))
        return estimated if estimated.size <= room else None

    found = found or _largest_top_k(codec.top_k, without_sketch)
    if found is not None:
        return found
    least = cost(plain.model_copy(update={"top_k": LEAST_TOP_K}))
    raise CachekdError(
        "the disk budget is too small for this data set",
        where="setting 'disk_budget'",
        expected=f"at least {least.size / BUDGET_USED / 1e6:,.2f} MB (top_k {LEAST_TOP_K}, no tail sketch)",
        found=f"{budget / 1e6:,.2f} MB for {least.tokens:,} answer tokens",
        fix="raise --disk-budget, or dump fewer samples with --limit",
    )


def _largest_top_k(most: int, try_it: Callable[[int], Estimate | None]) -> Estimate | None:
    """Search by bisection: what fits at some top_k fits at smaller ones."""
    if best := try_it(most):
        return best
    low, high = LEAST_TOP_K, most
    best = try_it(low) if low < high else None
    while best is not None and high - low > 1:
        middle = (low + high) // 2
        if found := try_it(middle):
            best, low = found, middle
        else:
            high = middle
    return best


def _finest(cost: Callable[[CodecSettings], Estimate], codec: CodecSettings, budget: int) -> Estimate | None:
    """The finest sketch that fits; None if there is no room for LEAST_SKETCH bytes a token."""
    for most in ("exact", ALL_THAT_BYTES_BUY):
        best = cost(_with_tail(codec, most))
        if best.size <= budget:
            return best
    bare = cost(_with_tail(codec, "none"))
    room = (budget - bare.size) / max(1, bare.tokens) - SHIFT_BYTES
    for _ in range(4):  # the basis' own size depends on how fine it is
        if room < LEAST_SKETCH:
            return None
        found = cost(_with_tail(codec, f"bytes={room:.1f}"))
        if found.size <= budget:
            return found
        room -= (found.size - budget) / max(1, found.tokens) * 1.02
    return None


def _with_tail(codec: CodecSettings, tail: str) -> CodecSettings:
    return codec.model_copy(update={"tail": tail, "logprob_step": TailSetting.parse(tail).logprob_step})
