"""The loop of stage one: read, run the teacher, code, write; all at the same time, with bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from cachekd.cache.build import CacheBuild
from cachekd.cache.plan import DumpPlan, FinishedShard
from cachekd.cache.shard_writer import ShardWriter
from cachekd.cache.source import Geometry
from cachekd.cache.tail.encoder import SketchEncoder
from cachekd.data import Encoded, Samples
from cachekd.data.batches import BatchLimits
from cachekd.data.left_out import DataHealth, may_be_left_out, reason_of
from cachekd.data.loader import prefetched, read_encoded
from cachekd.dump.teacher import Answer, Teacher
from cachekd.errors import BadSample
from cachekd.models.fitting import FittingBatches
from cachekd.models.placement import output_device

Span = tuple[int, int]


def make_shards(
    build: CacheBuild[DumpPlan],
    numbers: Iterable[int],
    samples: Samples,
    teacher: Teacher,
    encoder: SketchEncoder | None,
    *,
    limits: BatchLimits,
    halves: bool = False,
    workers: int,
    on_error: str,
    known: Mapping[str, Answer],
    progress: Callable[[int, int], None],
) -> None:
    """Make shards of the plan, one after the other.

    A thread (or `workers` processes) reads up to a group of samples ahead; another thread packs and writes a
    shard while the teacher is at the next.

    Args:
        numbers: of the shards.
        limits: of a batch.
        halves: whether batches become smaller where memory runs out, for the rest of the shard.
        known: answers that the pilot has already.
        progress: is told of samples and answer tokens.

    Raises:
        CachekdError: a bad sample where `on_error` is "stop", data that vanished, a disk that is full, memory
            that ran out.
    """
    numbers, geometry, spans = list(numbers), build.plan.source.geometry, build.plan.spans()
    pieces = {number: list(groups_of(spans[number], geometry)) for number in numbers}
    unknown = (
        index
        for number in numbers
        for piece in pieces[number]
        if not _is_known(piece, samples, known)
        for index in range(*piece)
    )
    read = read_encoded(samples, teacher.encoder, list(unknown), workers=workers)
    stream = prefetched(read, geometry.group_samples)
    batches = FittingBatches(limits, halves=halves)
    finishing: Future[FinishedShard] | None = None
    health = DataHealth(len(samples), samples.__getitem__)
    with ThreadPoolExecutor(1, "finish-shard") as background:
        try:
            for number in numbers:
                writer = ShardWriter(build, number, spans[number], encoder=encoder, head=teacher.head)
                batches.as_planned()  # what a shard holds depends on nothing that came before
                for piece in pieces[number]:
                    answers = _answers(piece, stream, samples, teacher, batches, known)
                    for index, answer in zip(range(*piece), answers, strict=True):
                        if isinstance(answer, Answer):
                            health.good(index)
                        else:
                            health.bad([answer])
                        progress(1, _pass_on(samples.keys[index], answer, writer, on_error))
                if writer.skips:
                    health.require_there()  # before the shard says for good that they are bad
                writer.halved = batches.halved
                if finishing is not None:
                    finishing.result()  # at most one shard waits: memory is bounded, errors are seen
                finishing = background.submit(writer.finish)
            if finishing is not None:
                finishing.result()
        finally:
            stream.close()


def groups_of(span: Span, geometry: Geometry) -> Iterator[Span]:
    """A shard's samples, cut into what is sorted by length together."""
    first, last = span
    for start in range(first, last, geometry.group_samples):
        yield start, min(start + geometry.group_samples, last)


def _answers(
    piece: Span,
    stream: Iterator[Encoded | BadSample],
    samples: Samples,
    teacher: Teacher,
    batches: FittingBatches,
    known: Mapping[str, Answer],
) -> Iterator[Answer | BadSample]:
    if _is_known(piece, samples, known):
        return (known[key].to(output_device(teacher.model)) for key in samples.keys[slice(*piece)])
    return teacher.answers(list(islice(stream, piece[1] - piece[0])), batches, known)


def _is_known(piece: Span, samples: Samples, known: Mapping[str, Answer]) -> bool:
    return all(key in known for key in samples.keys[slice(*piece)])


def _pass_on(key: str, answer: Answer | BadSample, writer: ShardWriter, on_error: str) -> int:
    """Give an answer to the writer; returns its number of tokens."""
    if isinstance(answer, Answer):
        writer.add(answer.key, answer.targets, answer.content_hash, answer.states, answer.images, answer.cut)
        return len(answer.targets)
    if not may_be_left_out(answer, on_error):
        raise answer
    writer.skip(key, reason_of(answer))
    return 0
