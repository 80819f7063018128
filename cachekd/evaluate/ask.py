"""One model, asked every question of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from cachekd.config.data import OnError
from cachekd.data import Samples, read_encoded
from cachekd.data.left_out import BadSamples, DataHealth, may_be_left_out
from cachekd.data.loader import prefetched
from cachekd.errors import BadSample
from cachekd.evaluate.comparison import Target
from cachekd.evaluate.forward import Answered, Question, QuestionRunner
from cachekd.evaluate.questions import AskedSample, QuestionEncoder
from cachekd.evaluate.reference import KeptAnswer

BATCHES_PER_SORT = 8  # questions are sorted by length within so many batches: then padding is rare
MOST_WAITING = 2**28  # bytes of their inputs
_READ_AHEAD = 32  # samples

Progress = Callable[[int, int], None]  # samples and questions since the last call


@dataclass(frozen=True)
class Answers:
    """What a model makes of one sample's questions.

    Attributes:
        sample: with its questions, without their model inputs.
        right: for each, whether the answer is right.
        blind: the same without pictures; None where there are none, or nobody asks for it.
        compared, agreed, divergence: see `Answered`; summed over all questions.
        tokens: answer tokens of all questions.
        over_cells: whether any question is compared with the teacher over cells, or cannot be.
        differs: of each question that cannot, its number and why.
        kept: the answer to each question with its states; empty if none are kept.
    """

    sample: AskedSample
    right: list[bool]
    blind: list[bool] | None
    compared: int
    agreed: int
    divergence: float
    tokens: int
    over_cells: bool
    differs: dict[int, str]
    kept: list[KeptAnswer]


def ask(
    runner: QuestionRunner,
    samples: Samples,
    encode: QuestionEncoder,
    bad: BadSamples,
    *,
    workers: int,
    on_error: OnError,
    progress: Progress,
) -> Iterator[Answers]:
    """Every question of every sample; of a bad sample none, also where only one of them is bad.

    Args:
        runner: of the model.
        encode: with the model's own processor and template.
        bad: samples that were left out before, and are again; it is told of others.
        workers: processes that read and encode samples; 0: a thread.
        on_error: whether a bad sample stops, or is left out.

    Raises:
        CachekdError: a bad sample that stops, data that have gone, or a model that cannot be run.
    """
    health = DataHealth(len(samples), samples.__getitem__)

    def refused(key: str, error: BadSample) -> None:
        if not may_be_left_out(error, on_error):
            raise error
        bad.note(key, error)
        health.bad([error])
        progress(1, 0)

    def answered(group: list[AskedSample]) -> Iterator[Answers]:
        for sample, found in zip(group, _run(runner, group), strict=True):
            if isinstance(found, BadSample):
                refused(sample.key, found)
            else:
                progress(1, len(found.right))
                yield found

    indices = [index for index, key in enumerate(samples.keys) if key not in bad.reasons]
    progress(len(samples) - len(indices), 0)
    group: list[AskedSample] = []
    questions = tokens = waiting = 0
    read = read_encoded(samples, encode, indices, workers=workers)
    with closing(prefetched(read, _READ_AHEAD)) as stream:
        for index, sample in zip(indices, stream, strict=True):
            if isinstance(sample, BadSample):
                refused(samples.keys[index], sample)
                continue
            health.good(index)
            group.append(sample)
            questions, waiting = questions + len(sample.encoded), waiting + sample.nbytes
            tokens += sum(map(len, sample.encoded))
            limits = runner.batches.limits
            enough = limits.filled_by(questions // BATCHES_PER_SORT, tokens // BATCHES_PER_SORT)
            if enough or waiting >= MOST_WAITING:
                yield from answered(group)
                group, questions, tokens, waiting = [], 0, 0, 0
        yield from answered(group)


def _run(runner: QuestionRunner, group: Sequence[AskedSample]) -> list[Answers | BadSample]:
    """A group of samples; what is wrong with one is its value."""
    targets: list[list[Target | None]] = [
        [None] * len(sample.encoded) if runner.comparison is None else [*runner.comparison.of(sample)]
        for sample in group
    ]
    questions = [
        Question(encoded, target)
        for sample, parts in zip(group, targets, strict=True)
        for encoded, target in zip(sample.encoded, parts, strict=True)
    ]
    seen = iter(runner.run(questions))
    blind = iter(runner.run([Question(encoded) for sample in group for encoded in sample.blind]))
    return [
        _answers(sample, parts, [next(seen) for _ in sample.encoded], [next(blind) for _ in sample.blind])
        for sample, parts in zip(group, targets, strict=True)
    ]


def _answers(
    sample: AskedSample,
    targets: list[Target | None],
    seen: list[Answered | BadSample],
    blind: list[Answered | BadSample],
) -> Answers | BadSample:
    good: list[list[Answered]] = [[], []]
    for side, some in zip(good, (seen, blind), strict=True):
        for one in some:
            if isinstance(one, BadSample):
                return one
            side.append(one)
    right = [one.right for one in good[0]]
    tokens = [encoded.token_ids for encoded in sample.encoded]
    return Answers(
        sample=sample.without_inputs(),
        right=right,
        blind=[one.right for one in good[1]] or None,
        compared=sum(one.compared for one in good[0]),
        agreed=sum(one.agreed for one in good[0]),
        divergence=sum(one.divergence for one in good[0]),
        tokens=sum(map(len, tokens)),
        over_cells=any(one is not None and one.over_cells for one in targets),
        differs={
            number: one.differs
            for number, one in enumerate(targets)
            if one is not None and one.differs is not None
        },
        kept=[
            KeptAnswer(ids, one.states)
            for ids, one in zip(tokens, good[0], strict=True)
            if one.states is not None
        ],
    )
