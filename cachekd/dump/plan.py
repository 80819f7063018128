"""What a dump sets out to do: its data, its teacher, how it is cut up, and whether there is room for it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cachekd.atomic import free_space
from cachekd.cache import CodecSettings, DataInfo, DumpPlan, DumpSource, Geometry, TailSetting
from cachekd.cache.compare import dependencies, require_same
from cachekd.cache.manifest import VocabularyInfo
from cachekd.cache.topk import default_top_p
from cachekd.config import DataOptions, DumpConfig
from cachekd.data import Samples
from cachekd.data.batches import BatchLimits
from cachekd.data.images import READING
from cachekd.data.open import content_hash, keys_hash
from cachekd.dump.batching import SHARD_TOKENS, Look, fitting, samples_per_group
from cachekd.dump.estimate import Estimate, estimate, fit_budget
from cachekd.dump.pilot import Pilot, planned_limits, run_pilot
from cachekd.dump.shards import groups_of
from cachekd.dump.teacher import Teacher
from cachekd.errors import CachekdError, LeftOut
from cachekd.models import ModelFiles
from cachekd.models.fingerprint import library_versions, reads_images_otherwise

_READING = "reading of images"
# What the manifest says of how the data were read, under the same names.
_RECORDED = set(DataOptions.model_fields) & set(DataInfo.model_fields)


def codec_of(config: DumpConfig) -> CodecSettings:
    """The settings that were asked for; a disk budget may choose others."""
    tail = TailSetting.parse(config.tail)
    return CodecSettings(
        top_k=config.top_k,
        top_p=default_top_p(tail) if config.top_p is None else config.top_p,
        window=config.window,
        min_k=config.min_k,
        logprob_step=tail.logprob_step,
        tail=config.tail,
    )


def require_vocabulary(config: DumpConfig, teacher: ModelFiles) -> None:
    """Refuse to keep or to look at more logprobs than the teacher has ids; no weights are read.

    Raises:
        CachekdError: a setting is larger than its vocabulary.
    """
    tokens = len(teacher.processor.tokenizer)
    ids = min(tokens, getattr(teacher.config.get_text_config(), "vocab_size", None) or tokens)
    for name in ("top_k", "window"):
        if (value := getattr(config, name)) > ids:
            raise CachekdError(
                f"setting {name!r} is larger than the teacher's vocabulary",
                where=config.teacher,
                expected=f"at most {ids:,}, its ids",
                found=f"{value:,}",
                fix=f"--{name.replace('_', '-')} {ids}",
            )


def pilot_of(
    config: DumpConfig,
    samples: Samples,
    teacher: Teacher,
    earlier: DumpPlan | None,
    progress: Callable[[int, int], None],
) -> Pilot:
    """Run the pilot of a new dump, in batches that fit the memory, or again that of an earlier one.

    Raises:
        OutOfMemory: batches as they are said or planned, or a single sample, do not fit.
    """

    def run(geometry: Geometry) -> Pilot:
        size = geometry.shard_samples
        shards = [(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]
        return run_pilot(
            teacher,
            samples,
            [group for shard in shards for group in groups_of(shard, geometry)],
            geometry,
            tokens=geometry.calibration_tokens,
            progress=progress,
        )

    if earlier is not None:
        pilot = run(earlier.source.geometry)
    else:
        look = Look.at(samples, teacher)
        pilot = fitting(
            config, look, teacher, lambda limits: run(_first_geometry(config, limits, look, len(samples)))
        )
    for bad in pilot.bad if config.on_error == "stop" else []:
        if not isinstance(bad, LeftOut):
            raise bad
    return pilot


def estimate_of(
    config: DumpConfig,
    samples: Samples,
    teacher: Teacher,
    pilot: Pilot,
    vocabulary: VocabularyInfo | None = None,
) -> Estimate:
    """What the dump will cost, with the codec that a disk budget chooses.

    Args:
        vocabulary: the one that the cache will have.
    """
    cost = partial(
        estimate,
        pilot,
        teacher,
        samples=len(samples),
        shard_samples=config.shard_samples,
        workers=config.workers,
        vocabulary=vocabulary,
    )
    if config.disk_budget is None:
        return cost(teacher.codec)
    return fit_budget(cost, teacher.codec, int(config.disk_budget))


def new_plan(
    config: DumpConfig, samples: Samples, teacher: Teacher, pilot: Pilot, found: Estimate
) -> DumpPlan:
    """Plan a dump that starts, in the pilot's batches."""
    group = pilot.geometry.group_samples
    groups = max(1, round(SHARD_TOKENS * found.samples / max(1, found.tokens) / group))
    fair = -(-found.samples // (config.world_size * group))  # every process gets a shard, if groups suffice
    shard = config.shard_samples or min(groups, fair) * group
    geometry = pilot.geometry.model_copy(update={"shard_samples": shard})
    return _plan(config, samples, teacher, geometry, found.codec, found.vocabulary)


def same_plan(config: DumpConfig, samples: Samples, teacher: Teacher, earlier: DumpPlan) -> DumpPlan:
    """The plan of an earlier run, if this run would do the same.

    Raises:
        CachekdError: it would not: what differs, old and new.
    """
    require_same_shards(config, earlier)
    geometry = earlier.source.geometry.model_copy(update=_of_the_pilot(config))
    codec = teacher.codec if config.disk_budget is None else earlier.codec
    plan = _plan(config, samples, teacher, geometry, codec, earlier.vocabulary)
    where = str(config.out)
    require_same(
        dependencies(earlier, earlier.source),
        dependencies(plan, plan.source),
        "the dump in this folder",
        where,
    )
    return earlier


def require_same_shards(config: DumpConfig, earlier: DumpPlan) -> None:
    """Refuse to go on with shards of another size, where one is asked for.

    Raises:
        CachekdError: `earlier` has another.
    """
    name, size = "setting shard_samples", earlier.source.geometry.shard_samples
    asked = config.shard_samples or size
    require_same({name: size}, {name: asked}, "the dump in this folder", str(config.out))


def require_same_code(plan: DumpPlan, out: Path) -> None:
    """Refuse to take away what only a dump makes again that would not go on here.

    Raises:
        CachekdError: the libraries, or how images are read, are others than those of the plan.
    """
    then: dict[str, Any] = dict(plan.source.versions)
    now: dict[str, Any] = library_versions()
    if reads_images_otherwise(plan.fingerprints):
        then, now = then | {_READING: plan.fingerprints.image_reading}, now | {_READING: READING}
    require_same(then, now, "nothing was deleted, for the dump", str(out))


def command_of(plan: DumpPlan, out: Path, *, skips: bool) -> str:
    """The `cachekd dump` that goes on with a plan, as far as plans tell: none says where pictures start.

    Args:
        skips: whether bad samples were left out, which it does not say either.
    """
    codec, geometry = plan.codec, plan.source.geometry
    limits = planned_limits(geometry)
    said: dict[str, Any] = {
        "teacher": plan.teacher.name,
        **plan.source.data.model_dump(include=_RECORDED | {"path"}),
        "out": out,
        "dtype": plan.teacher.dtype,
        **plan.source.model_dump(include={"attn_implementation", "float32_head"}),
        "on_error": "skip" if skips else "stop",
        **codec.model_dump(include={"top_k", "top_p", "tail", "window", "min_k"}),
        **geometry.model_dump(include={"calibration_tokens", "disk_budget"}),
        "batch_tokens": limits.tokens,
        "batch_size": limits.samples,
    }
    said["data"] = said.pop("path")
    if codec.top_p == default_top_p(TailSetting.parse(codec.tail)):
        said["top_p"] = None
    if geometry.budget_for is not None:  # what a budget began from counts, not what it chose
        began = (part.split(" ") for part in geometry.budget_for.split(", "))
        said |= {name: None if value == "None" else value for name, value in began}
    words = ["cachekd", "dump"]
    if (quantised := plan.teacher.quantization) is not None and quantised.setting is not None:
        said["quantization"] = json.dumps(quantised.setting)
    for name, field in DumpConfig.model_fields.items():
        value = said.get(name)
        if value is None or str(value) == str(field.default):
            continue
        for one in value if isinstance(value, tuple) else (value,):
            words += [f"--{name.replace('_', '-')}", *([] if one is True else [str(one)])]
    return shlex.join(words)


def refuse_small_disk(folder: Path, needed: int, what: str, *, may_shrink: bool = False) -> None:
    """Refuse to start what cannot be finished.

    Args:
        may_shrink: whether the settings may still become others; those of a dump that has begun may not.

    Raises:
        CachekdError: less than `needed` bytes are free.
    """
    place, free = free_space(folder)
    if needed > free:
        fix = "free some space on this disk, then run the same command again: what is finished stays"
        if may_shrink:
            fix = f"free some space, choose another --out, or try --disk-budget {int(0.9 * free / 1e3)}kB"
        raise CachekdError(
            "the disk is too small",
            where=str(place),
            expected=f"{needed / 1e6:,.3f} MB for {what}",
            found=f"{free / 1e6:,.3f} MB are free",
            fix=fix,
        )


def _first_geometry(config: DumpConfig, limits: BatchLimits, look: Look, samples: int) -> Geometry:
    """How the pilot cuts the data set up: how large shards are to be is not known yet."""
    group = samples_per_group(config, limits, look, samples)
    return Geometry(
        shard_samples=config.shard_samples or group,
        group_samples=group,
        batch_size=limits.samples or group,  # no batch is larger than its group
        batch_tokens=limits.tokens,
        **_of_the_pilot(config),
    )


def _of_the_pilot(config: DumpConfig) -> dict[str, Any]:
    """What a geometry says of the pilot: its size, the disk budget, and what that was to begin from."""
    size, budget = {"calibration_tokens": config.calibration_tokens}, config.disk_budget
    if budget is None:
        return {**size, "disk_budget": None, "budget_for": None}
    began = f"top_k {config.top_k}, top_p {config.top_p}, tail {config.tail}"
    return {**size, "disk_budget": int(budget), "budget_for": began}


def _plan(
    config: DumpConfig,
    samples: Samples,
    teacher: Teacher,
    geometry: Geometry,
    codec: CodecSettings,
    vocabulary: VocabularyInfo | None,
) -> DumpPlan:
    data = DataInfo(
        path=config.data,
        samples=len(samples),
        sha256=keys_hash(samples),
        content_sha256=content_hash(samples),
        repeated_keys=samples.notes.repeated_keys,
        other_files=len(samples.notes.other_files),
        **config.model_dump(include=_RECORDED),
    )
    return DumpPlan(
        teacher=teacher.info(),
        fingerprints=teacher.files.fingerprints,
        codec=codec,
        vocabulary=vocabulary,
        source=DumpSource(
            data=data,
            geometry=geometry,
            versions=library_versions(),
            attn_implementation=config.attn_implementation,
            float32_head=config.float32_head,
        ),
    )
