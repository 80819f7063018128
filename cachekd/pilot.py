"""A few batches from all over the data set: to fit the tail sketch, and to know the cost beforehand."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from cachekd.cache import CodecSettings, Geometry, Plan, TailSetting, TailStates, TokenTargets
from cachekd.cache.fit import SketchEncoder, fit_sketch
from cachekd.cache.select import default_top_p
from cachekd.cache.shard import make_shard, pack_shard
from cachekd.errors import BadSample, CachekdError
from cachekd.samples import Samples
from cachekd.samples.reader import read_encoded
from cachekd.teacher import Answer, Teacher, batches_of

GOLDEN_RATIO = (5**0.5 - 1) / 2
SHIFT_BYTES = 1.5  # per token, about, of the sketch's shift
SHARD_TOKENS = 65_536  # about; some 7 MB at 110 bytes per token
LEAST_SKETCH = 8  # bytes per token; below that the same bytes do more in the top-k
ALL_THAT_BYTES_BUY = "bytes=4096"  # no sketch needs as much: what bytes buy ends at BUDGET_NOISE
BUDGET_USED = 0.97  # the pilot may be off by a few percent
LEAST_TOP_K = 4  # that a disk budget may choose


@dataclass
class Pilot:
    """What the pilot saw.

    Attributes:
        codec, geometry: it was run with.
        answers: of the samples that were run, by key, in the order of the data set.
        tokens: answer tokens of every sample that was read, run or not.
        bad: samples that could not be used.
        run_seconds: of the teacher's forward and the selection.
        read_seconds: of reading and encoding samples.
    """

    codec: CodecSettings
    geometry: Geometry
    answers: dict[str, Answer] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    run_seconds: float = 0.0
    read_seconds: float = 0.0
    _fitted: tuple[CodecSettings, SketchEncoder] | None = None

    @property
    def targets(self) -> TokenTargets:
        """Of all answers."""
        return TokenTargets.concatenate([answer.targets for answer in self.answers.values()])

    @property
    def states(self) -> TailStates:
        """Of all answers."""
        states = [answer.states for answer in self.answers.values() if answer.states is not None]
        return TailStates.concatenate(states)

    def reusable(self, plan: Plan) -> dict[str, Answer]:
        """The answers as the dump itself would find them: those of another codec or batching would differ."""
        geometry, codec, ours = plan.source.geometry, plan.codec, self.geometry
        if geometry is None:
            return {}
        # Shards of whole groups cut the data set into the same groups, others only if they are as large.
        whole = not any(cut.shard_samples % ours.group_samples for cut in (geometry, ours))
        same = (
            (geometry.batch_size, geometry.group_samples) == (ours.batch_size, ours.group_samples)
            and (whole or geometry.shard_samples == ours.shard_samples)
            and (codec.top_k, codec.top_p) == (self.codec.top_k, self.codec.top_p)
        )
        return self.answers if same else {}

    def fit(self, teacher: Teacher, codec: CodecSettings | None = None) -> SketchEncoder:
        """The tail sketch, by the teacher's codec or another one; the last one is remembered."""
        codec = codec or teacher.codec
        if self._fitted is None or self._fitted[0] != codec:
            assert teacher.head is not None
            targets, tail = self.targets.truncate(codec.top_k), TailSetting.parse(codec.tail)
            self._fitted = codec, fit_sketch(teacher.head, self.states, targets, tail)
        return self._fitted[1]


@dataclass(frozen=True)
class Estimate:
    """What the whole dump will be like.

    Attributes:
        tokens: answer tokens.
        tokens_error: one standard error of that.
        bytes_per_token: of the shards.
        shard_bytes, sketch_bytes: on the disk.
        seconds: with this process alone.
        peak_memory: bytes; of the GPU if there is one, else of the process.
    """

    samples: int
    tokens: int
    tokens_error: int
    bytes_per_token: float
    shard_bytes: int
    sketch_bytes: int
    seconds: float
    peak_memory: int
    codec: CodecSettings

    @property
    def size(self) -> int:
        """Bytes of the cache."""
        return self.shard_bytes + self.sketch_bytes


def run_pilot(
    teacher: Teacher,
    samples: Samples,
    groups: list[tuple[int, int]],
    geometry: Geometry,
    *,
    tokens: int,
    progress: Callable[[int, int], None] = lambda samples, tokens: None,
) -> Pilot:
    """Run batches until `tokens` answer tokens are there, or the data set is at its end.

    Samples are read group by group, groups evenly spread over the data set, and of each group as many batches
    are run as make the pilot's tokens come from as many groups as possible. A batch is the very batch of the
    dump, so what was run here need not be run again.

    Raises:
        CachekdError: no sample of the pilot can be used.
    """
    pilot, found, per_group = Pilot(teacher.codec, geometry), 0, 0
    for turn, number in enumerate(_spread(len(groups))):
        started = time.perf_counter()
        group = list(read_encoded(samples, teacher.encoder, range(*groups[number]), workers=0))
        pilot.read_seconds += time.perf_counter() - started
        pilot.bad += [sample for sample in group if isinstance(sample, BadSample)]
        pilot.tokens += [len(sample.token_ids) for sample in group if not isinstance(sample, BadSample)]
        batches = batches_of(group, geometry.batch_size)
        if not batches:
            continue
        if not per_group:
            wanted = tokens / (sum(pilot.tokens) / len(batches))
            per_group = max(1, -int(-wanted // len(groups)))
        for batch in _evenly(batches, min(per_group, len(batches)), turn):
            started = time.perf_counter()
            answers = teacher.run([sample for _, sample in batch])
            pilot.run_seconds += time.perf_counter() - started
            pilot.bad += [answer for answer in answers if isinstance(answer, BadSample)]
            good = [answer for answer in answers if isinstance(answer, Answer)]
            pilot.answers |= {answer.key: answer.to("cpu") for answer in good}
            found += sum(len(answer.targets) for answer in good)
            progress(len(batch), sum(len(answer.targets) for answer in good))
        if found >= tokens:
            break
    if not pilot.answers:
        raise CachekdError(
            "no sample of the pilot can be used",
            found=f"{len(pilot.bad)} bad samples, the first: {pilot.bad[0] if pilot.bad else 'none'}",
        )
    pilot.answers = {key: pilot.answers[key] for key in samples.keys if key in pilot.answers}
    return pilot


def estimate(
    pilot: Pilot,
    teacher: Teacher,
    codec: CodecSettings,
    samples: int,
    shard_samples: int | None = None,
    workers: int = 0,
) -> Estimate:
    """What a dump will cost.

    Args:
        codec: to be used; the pilot may have had a larger top_k.
        samples: of the data set.
        shard_samples: per shard; None for SHARD_TOKENS answer tokens.
        workers: processes that read samples.
    """
    encoder = pilot.fit(teacher, codec) if TailSetting.parse(codec.tail).sketch else None
    counts = torch.tensor(pilot.tokens, dtype=torch.float64)
    usable = samples * len(counts) / (len(counts) + len(pilot.bad))
    error = float(counts.std(correction=0)) * (max(0.0, 1 - len(counts) / samples) / len(counts)) ** 0.5
    tokens = round(usable * float(counts.mean()))
    shard_tokens = SHARD_TOKENS if shard_samples is None else shard_samples * float(counts.mean())
    shard_bytes = _shard_bytes(pilot, codec, encoder, tokens, shard_tokens)
    run = pilot.run_seconds / len(pilot.answers)
    read = pilot.read_seconds / (len(counts) + len(pilot.bad)) / max(1, workers)
    return Estimate(
        samples=samples,
        tokens=tokens,
        tokens_error=round(usable * error),
        bytes_per_token=shard_bytes / tokens,
        shard_bytes=round(shard_bytes),
        sketch_bytes=len(encoder.pack()) if encoder is not None else 0,
        seconds=usable * max(run, read),  # they overlap
        peak_memory=peak_memory(teacher.model.device),
        codec=codec,
    )


def fit_budget(cost: Callable[[CodecSettings], Estimate], codec: CodecSettings, budget: int) -> Estimate:
    """The setting that makes the most of `budget` bytes for the whole cache.

    The frontier that was measured (docs/what-the-cache-keeps.md): Kneedle's k and as fine a sketch as there
    is room for; smaller k only where nothing else is left, no sketch where it would not pay for its basis.

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
    plain = _with_tail(codec, "none").model_copy(update={"top_p": default_top_p(TailSetting(sketch=False))})

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
    """By bisection: what fits at some top_k fits at smaller ones."""
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


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was in use so far, of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _shard_bytes(
    pilot: Pilot, codec: CodecSettings, encoder: SketchEncoder | None, tokens: int, shard_tokens: float
) -> float:
    """Of `tokens` tokens in shards of `shard_tokens`.

    Tables and rare ids weigh more in a small shard. So the pilot's own tokens are packed, as many as a shard
    has if there are so many and half of that, and what lies beyond is on their line.
    """
    targets = pilot.targets.truncate(codec.top_k)
    samples = [(answer.key, answer.content_hash, len(answer.targets)) for answer in pilot.answers.values()]
    counts = [tokens for _, _, tokens in samples]
    if encoder is not None:
        targets = replace(targets, sketch=encoder.encode(pilot.states))
    sizes = []
    whole = min(1.0, shard_tokens / len(targets))
    for share in (whole / 2, whole):
        # Every so manieth sample, so that both have some of everything.
        chosen = _evenly(list(range(len(counts))), max(1, round(share * len(counts))), 0)
        parts = targets.split(counts)
        some = TokenTargets.concatenate([parts[index] for index in chosen])
        shard = make_shard([samples[index] for index in chosen], some)
        sizes.append((len(shard.targets), len(pack_shard(shard, codec.logprob_step))))
    (less, small), (more, large) = sizes
    rate = (large - small) / (more - less) if more > less else large / more
    shards = max(1.0, tokens / shard_tokens)
    return shards * (large - rate * more) + (rate + (encoder.surplus if encoder else 0.0)) * tokens


def _spread(count: int) -> Iterator[int]:
    """0 to count - 1, each once, at any time evenly spread."""
    seen = set()
    for turn in range(20 * count):
        number = int(turn * GOLDEN_RATIO % 1 * count)
        if number not in seen:
            seen.add(number)
            yield number
    yield from (number for number in range(count) if number not in seen)


def _evenly(batches: list, wanted: int, turn: int) -> list:
    """`wanted` of the batches, short and long ones alike, others at every turn."""
    offset = turn * GOLDEN_RATIO % 1
    return [batches[int((place + offset) * len(batches) / wanted)] for place in range(wanted)]
