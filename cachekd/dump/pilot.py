"""A few batches from all over the data set: to fit the tail sketch, and to know the cost beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cachekd.cache import CodecSettings, DumpPlan, Geometry, TailSetting, TailStates, TokenTargets
from cachekd.cache.tail.encoder import SketchEncoder
from cachekd.cache.tail.fit import fit_sketch
from cachekd.data import Encoded, Samples
from cachekd.data.batches import BatchLimits
from cachekd.data.loader import read_encoded
from cachekd.data.spread import evenly, spread
from cachekd.dump.teacher import Answer, Teacher
from cachekd.errors import BadSample, CachekdError


def planned_limits(geometry: Geometry) -> BatchLimits:
    """What a batch of a dump that is so cut up may hold."""
    unbounded = geometry.batch_tokens is not None and geometry.batch_size == geometry.group_samples
    return BatchLimits(None if unbounded else geometry.batch_size, geometry.batch_tokens)


@dataclass
class Pilot:
    """What the pilot saw.

    Attributes:
        codec, geometry: it was run with.
        answers: of the samples that were run, by key, in the order of the data set.
        tokens: answer tokens of every sample that was read, run or not.
        bad: samples that could not be used, or are left out.
        batches: of the samples that were read, run or not.
        batches_run: of these.
        run_seconds: of the teacher's forward and the selection.
        read_seconds: of reading and encoding samples.
    """

    codec: CodecSettings
    geometry: Geometry
    answers: dict[str, Answer] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    batches: int = 0
    batches_run: int = 0
    run_seconds: float = 0.0
    read_seconds: float = 0.0
    _fitted: tuple[CodecSettings, SketchEncoder] | None = None

    @property
    def targets(self) -> TokenTargets:
        """The targets of all answers."""
        return TokenTargets.concatenate([answer.targets for answer in self.answers.values()])

    @property
    def states(self) -> TailStates:
        """The states of all answers."""
        states = [answer.states for answer in self.answers.values() if answer.states is not None]
        return TailStates.concatenate(states)

    def reusable(self, plan: DumpPlan) -> dict[str, Answer]:
        """The answers as the dump itself would find them: those of another codec or batching would differ."""
        geometry, codec, ours = plan.source.geometry, plan.codec, self.geometry
        # Shards of whole groups cut the data set into the same groups, others only if they are as large.
        whole = not any(cut.shard_samples % ours.group_samples for cut in (geometry, ours))
        same = (
            (planned_limits(geometry), geometry.group_samples) == (planned_limits(ours), ours.group_samples)
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
        OutOfMemory: a batch does not fit.
    """
    pilot, found, per_group = Pilot(teacher.codec, geometry), 0, 0
    for turn, number in enumerate(spread(len(groups))):
        read = _read(pilot, teacher, samples, groups[number])
        batches = planned_limits(geometry).cut([len(sample) for sample in read])
        pilot.batches += len(batches)
        if not batches:
            continue
        if not per_group:
            wanted = tokens / (sum(pilot.tokens) / len(batches))
            per_group = max(1, -int(-wanted // len(groups)))
        for batch in evenly(batches, min(per_group, len(batches)), turn):
            answered = _run(pilot, teacher, [read[place] for place in batch])
            found += answered
            progress(len(batch), answered)
        if found >= tokens:
            break
    if not pilot.answers:
        raise CachekdError(
            "no sample of the pilot can be used",
            found=f"{len(pilot.bad)} bad samples, the first: {pilot.bad[0] if pilot.bad else 'none'}",
        )
    pilot.answers = {key: pilot.answers[key] for key in samples.keys if key in pilot.answers}
    return pilot


def _read(pilot: Pilot, teacher: Teacher, samples: Samples, group: tuple[int, int]) -> list[Encoded]:
    """A group's samples that can be used, timed and counted."""
    started = time.perf_counter()
    read = list(read_encoded(samples, teacher.encoder, range(*group), workers=0))
    pilot.read_seconds += time.perf_counter() - started
    pilot.bad += [sample for sample in read if isinstance(sample, BadSample)]
    good = [sample for sample in read if not isinstance(sample, BadSample)]
    pilot.tokens += [len(sample.token_ids) for sample in good]
    return good


def _run(pilot: Pilot, teacher: Teacher, batch: list[Encoded]) -> int:
    """The teacher's answers to a batch, timed and kept; how many answer tokens they have."""
    started = time.perf_counter()
    answers = teacher.run(batch)
    pilot.run_seconds += time.perf_counter() - started
    pilot.batches_run += 1
    pilot.bad += [answer for answer in answers if isinstance(answer, BadSample)]
    good = [answer for answer in answers if isinstance(answer, Answer)]
    pilot.answers |= {answer.key: answer.to("cpu") for answer in good}
    return sum(len(answer.targets) for answer in good)
