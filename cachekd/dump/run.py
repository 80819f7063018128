"""Stage one: run the teacher once, keep its sparse logits at the answer tokens.

Start it again with the same settings and it goes on; start it several times, with ranks, and they share the
work. What is on the disk, and in which order: `cachekd.cache.build`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

from cachekd.atomic import require_room_for
from cachekd.cache import CodecSettings, Fidelity, TailSetting
from cachekd.cache.build import CacheBuild, find_plan
from cachekd.cache.layout import SKETCH_FILE
from cachekd.cache.plan import DumpPlan, FinishedShard
from cachekd.config import DataOptions, DumpConfig
from cachekd.config.data import OnError
from cachekd.data import Samples, open_samples
from cachekd.data.batches import limits_said
from cachekd.data.left_out import first_good
from cachekd.dump.estimate import Estimate
from cachekd.dump.pilot import planned_limits
from cachekd.dump.plan import (
    codec_of,
    estimate_of,
    new_plan,
    pilot_of,
    refuse_small_disk,
    require_same_shards,
    require_vocabulary,
    same_plan,
)
from cachekd.dump.shards import make_shards
from cachekd.dump.teacher import Teacher
from cachekd.models import ModelFiles, default_device, dtype_of, limits_of
from cachekd.models.loading import LoadSettings

log = logging.getLogger(__name__)

Progress = Callable[[str, int | None, int, int], None]
"""Phase ("pilot", "dump"), its samples in all if known; samples and answer tokens since the last call."""


def no_progress(phase: str, total: int | None, samples: int, tokens: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class DumpSummary:
    """What there is of a cache after a dump.

    Attributes:
        finished: whether the cache is complete; if not, other processes are at work, or have died.
        shards, all_shards: how many are there, of how many.
        samples, tokens: in them; tokens are answer tokens.
        without_image: of the samples, those of text alone.
        cut: of the samples, those whose answers lack the end.
        repeated_keys: samples of the data set whose key came before.
        other_files: files of it that are no data.
        skipped: samples that were left out.
        bytes: of the shards on disk; the tail sketch's own file is apart.
        sketch_bytes: of that file.
        vocabulary_bytes: of the vocabulary's; 0 where there is none.
        fidelity: the cache against the live teacher at a sample of the tokens; None without a sketch.
        halved: shards in which memory ran out, so that their batches became smaller.
        mean_k: logprobs kept per token.
        new_tokens: of this process, in this run.
        seconds: of the teacher's pass in this run.
    """

    out: Path
    finished: bool
    shards: int
    all_shards: int
    samples: int
    tokens: int
    without_image: int
    cut: int
    repeated_keys: int
    other_files: int
    skipped: int
    bytes: int
    sketch_bytes: int
    vocabulary_bytes: int
    fidelity: Fidelity | None
    halved: int
    mean_k: float
    new_tokens: int
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)


def dump(config: DumpConfig, progress: Progress = no_progress) -> DumpSummary:
    """Cache a teacher's logits over a data set, or continue a dump that was stopped.

    Raises:
        CachekdError: bad input, a folder with a dump of something else, or no room. Finished shards stay.
    """
    require_room_for(config.out)
    earlier = find_plan(config.out)
    samples, teacher = open_inputs(config)
    vocabulary = teacher.vocabulary() if earlier is None else None
    started, new_tokens = time.perf_counter(), 0
    pilot = None
    if earlier is None:
        pilot = pilot_of(config, samples, teacher, None, partial(progress, "pilot", None))
        found = estimate_of(config, samples, teacher, pilot, vocabulary and vocabulary.info)
        refuse_small_disk(config.out, found.size, "the whole cache", may_shrink=True)
        plan = new_plan(config, samples, teacher, pilot, found)
    else:
        plan = same_plan(config, samples, teacher, earlier)
        if TailSetting.parse(plan.codec.tail).sketch and not (config.out / SKETCH_FILE).exists():
            pilot = pilot_of(config, samples, teacher, earlier, partial(progress, "pilot", None))

    build = CacheBuild.start(config.out, plan)
    require_same_shards(config, build.plan)  # it is that of whoever was first
    build.keep_vocabulary(lambda: vocabulary or teacher.vocabulary())
    known = pilot.reusable(build.plan) if pilot is not None else {}
    teacher = teacher.keeping(build.plan.codec)
    encoder = None
    if TailSetting.parse(teacher.codec.tail).sketch:
        encoder = build.encoder(None if pilot is None else partial(pilot.fit, teacher))

    spans = build.plan.spans()
    records = build.finished_shards(len(spans))
    missing = [number for number in range(len(spans)) if number not in records]
    size, done = sum(_shards(records, "bytes")), max(1, len(records))
    refuse_small_disk(config.out, size * len(missing) // done, f"the other {len(missing)} shards")
    mine = [number for number in missing if number % config.world_size == config.rank]
    total = sum(spans[number][1] - spans[number][0] for number in mine)

    def advance(samples: int, tokens: int) -> None:
        nonlocal new_tokens
        new_tokens += tokens
        progress("dump", total, samples, tokens)

    planned = planned_limits(build.plan.source.geometry)
    limits = limits_said(config.batch_size, config.batch_tokens) or planned
    if earlier is not None and limits != planned:
        log.warning(
            "the dump goes on with %s, not its plan's %s: what is written is as good, "
            "but not byte for byte what those give",
            limits,
            planned,
        )

    advance(0, 0)
    make_shards(
        build,
        mine,
        samples,
        teacher,
        encoder,
        limits=limits,
        halves=config.on_oom == "halve",
        workers=config.workers,
        on_error=config.on_error,
        known=known,
        progress=advance,
    )
    records = build.finished_shards(len(spans))
    if len(records) == len(spans):
        build.assemble(len(spans))
    return _summary(build, records, len(spans), new_tokens, time.perf_counter() - started)


def estimate_dump(config: DumpConfig, progress: Progress = no_progress) -> Estimate:
    """What `dump` would cost; writes nothing.

    Raises:
        CachekdError: bad input.
    """
    samples, teacher = open_inputs(config)
    vocabulary = teacher.vocabulary()
    pilot = pilot_of(config, samples, teacher, None, partial(progress, "pilot", None))
    return estimate_of(config, samples, teacher, pilot, vocabulary and vocabulary.info)


def open_inputs(config: DumpConfig) -> tuple[Samples, Teacher]:
    """Data and teacher; whatever can be refused is refused before the weights are read.

    Raises:
        CachekdError: bad input.
    """
    codec = codec_of(config)
    samples = open_samples(config)
    files = teacher_files(config.teacher, config)
    require_vocabulary(config, files)
    files.require_attention(config.attn_implementation)
    files.require_device_map(config.load_settings["device_map"])
    teacher = load_teacher(
        files,
        samples,
        config.on_error,
        codec,
        config.dtype,
        float32_head=config.float32_head,
        **config.load_settings,
    )
    return samples, teacher


def teacher_files(path: str, options: DataOptions) -> ModelFiles:
    """The teacher's, within its own limits and what the options say of long samples.

    Raises:
        CachekdError: an unknown family, or no usable processor or chat template.
    """
    files = ModelFiles(path)
    return files.within(limits_of([files.config], max_tokens=options.max_tokens, too_long=options.too_long))


def load_teacher(
    files: ModelFiles,
    samples: Samples,
    on_error: OnError,
    codec: CodecSettings,
    dtype: str,
    *,
    float32_head: bool = False,
    **settings: Unpack[LoadSettings],
) -> Teacher:
    """The weights, once a sample could be encoded; and the head, measured on one.

    Args:
        on_error: whether a bad sample among the first stops.
        dtype: of torch, or "auto".
        float32_head: whether the head is applied in float32.
        settings: see `LoadSettings`.

    Raises:
        CachekdError: no such model, processor or way to load, or one that does not fit the data.
    """
    device = default_device()
    weights_dtype = dtype_of(dtype, device)
    quantization = files.quantization(settings.get("quantization"), weights_dtype)
    first_good(len(samples), lambda index: files.encoder(samples[index]), on_error)
    model = files.load(dtype=weights_dtype, device=device, **settings)
    teacher = Teacher(files, model, codec, quantization=quantization)
    if not (TailSetting.parse(codec.tail).sketch or float32_head):
        return teacher
    _, measured = first_good(
        len(samples), lambda index: teacher.with_head(files.encoder(samples[index])), on_error
    )
    return (measured.in_float32() if float32_head else measured).keeping(codec)


def _shards(records: dict[int, FinishedShard], name: str) -> list[int]:
    return [getattr(record.shard, name) for record in records.values() if record.shard is not None]


def _summary(
    build: CacheBuild[DumpPlan],
    records: dict[int, FinishedShard],
    shards: int,
    new_tokens: int,
    seconds: float,
) -> DumpSummary:
    sketch = build.sketch_info()
    tokens = sum(_shards(records, "tokens"))
    return DumpSummary(
        out=build.path,
        finished=len(records) == shards,
        shards=len(records),
        all_shards=shards,
        samples=sum(_shards(records, "samples")),
        tokens=tokens,
        without_image=sum(count or 0 for count in _shards(records, "without_image")),
        cut=sum(count or 0 for count in _shards(records, "cut")),
        repeated_keys=build.plan.source.data.repeated_keys,
        other_files=build.plan.source.data.other_files,
        skipped=sum(len(record.skipped) for record in records.values()),
        bytes=sum(_shards(records, "bytes")),
        sketch_bytes=sketch.bytes if sketch is not None else 0,
        vocabulary_bytes=0 if build.plan.vocabulary is None else build.plan.vocabulary.bytes,
        fidelity=Fidelity.of_all(one.shard.fidelity for one in records.values() if one.shard is not None),
        halved=sum(count > 0 for count in _shards(records, "halved")),
        mean_k=sum(_shards(records, "entries")) / max(1, tokens),
        new_tokens=new_tokens,
        seconds=seconds,
    )
