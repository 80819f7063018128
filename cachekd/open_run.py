"""What a training run reads, opened and checked before any model's weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cachekd.bind import open_bound
from cachekd.cache import DataInfo, LogitCache
from cachekd.config import TrainConfig
from cachekd.data_options import DataOptions
from cachekd.errors import BadSample, CachekdError
from cachekd.held_out import HeldOut, about, require_same_teacher, say_what_is_not_computed
from cachekd.left_out import LeftOutSamples
from cachekd.matching import check_cache, check_teacher
from cachekd.missing import dumped_data
from cachekd.samples import Limits, SampleEncoder, Samples, open_samples
from cachekd.samples.dumped import unsaid
from cachekd.samples.view import SamplesView
from cachekd.trainer import require_one_gpu
from cachekd.training_arguments import training_arguments
from cachekd.vlm import check_switch, check_tokenizers, limits_of, load_config, load_processor


@dataclass(frozen=True)
class OpenRun:
    """What a run reads, checked as far as it can be without any model's weights in memory.

    Attributes:
        samples: to train on.
        missing: that the cache lacks and that are left out of them.
        held_out: to evaluate while the student trains.
    """

    samples: Samples
    processor: Any
    encoder: SampleEncoder
    cache: LogitCache | None
    arguments: TrainingArguments
    missing: LeftOutSamples
    held_out: HeldOut | None = None


def open_run(config: TrainConfig, checkpoints: Path, phase: Callable[[str], None]) -> OpenRun:
    """Data, cache, processors and settings; whatever can be refused is refused before weights are loaded.

    Raises:
        CachekdError: what does not go together, or a run of no steps.
    """
    config.require_inputs()
    phase("opening the data")
    samples = open_samples(config)
    phase("opening the cache" if config.distils and not config.live_teacher else "reading the settings")
    cache = open_cache(config)
    processor = load_processor(config.student)
    encoder = SampleEncoder(processor, length_limits(config, cache))
    samples, missing = without_missing(config, samples, cache, processor, encoder)
    arguments = training_arguments(config, checkpoints)
    require_one_gpu(arguments)
    require_steps(len(samples), arguments)
    if config.runs_teacher:
        phase("comparing the teacher with the student and the cache")
        check_the_teacher(config, processor, samples, cache)
    held_out = open_held_out(config, processor, cache, phase)
    return OpenRun(samples, processor, encoder, cache, arguments, missing, held_out)


def open_held_out(
    config: TrainConfig, processor: Any, cache: LogitCache | None, phase: Callable[[str], None]
) -> HeldOut | None:
    """`eval_data` and `eval_cache`, checked as what the run trains on; None where there are no such data.

    Args:
        cache: of the training data. It says what is done with long samples, where nothing nearer does.

    Raises:
        CachekdError: what does not go together; the setting is named.
    """
    held_out = config.on_held_out()
    if held_out is None:
        return None
    phase("opening the held-out data")
    with about("eval_data"):
        samples = open_samples(held_out)
    with about("eval_cache"):
        eval_cache = open_cache(held_out) if config.eval_cache is not None else None
        if cache is not None and eval_cache is not None:
            require_same_teacher(cache, eval_cache)
    encoder = SampleEncoder(processor, length_limits(held_out, eval_cache or cache))
    with about("eval_cache", "or leave eval_cache out: L_CE alone is then evaluated"):
        samples, missing = without_missing(held_out, samples, eval_cache, processor, encoder)
    terms = config.eval_terms
    if "vsd" in terms and not has_pictures(samples, eval_cache):
        terms = tuple(name for name in terms if name != "vsd")
    found = HeldOut(samples, encoder, eval_cache, held_out.on_error, missing, terms)
    say_what_is_not_computed(config, found)
    return found


def without_missing(
    config: TrainConfig, samples: Samples, cache: LogitCache | None, processor: Any, encoder: SampleEncoder
) -> tuple[Samples, LeftOutSamples]:
    """The samples that are used, and those that are left out because the cache lacks them.

    Raises:
        CachekdError: as for `missing_in`.
    """
    missing = {} if cache is None else missing_in(cache, config, samples, processor, encoder)
    if config.missing != "skip" or not missing:
        return samples, LeftOutSamples()
    kept = [index for index, key in enumerate(samples.keys) if key not in missing]
    return SamplesView(samples, only=kept), LeftOutSamples.of(missing)


def require_steps(samples: int, arguments: TrainingArguments) -> None:
    """Refuse a run whose every epoch drops its only batch: it would end at once, the student untrained.

    Raises:
        CachekdError: `dataloader_drop_last` is on, and all samples are fewer than one batch.
    """
    a_batch = arguments.per_device_train_batch_size * arguments.world_size
    if not arguments.dataloader_drop_last or samples >= a_batch:
        return
    raise CachekdError(
        "the run would have no steps: the only batch is not full, and it is dropped",
        where="settings 'batch_size' and 'training.dataloader_drop_last'",
        expected=f"at least {a_batch} samples, one batch of {arguments.world_size} process(es)",
        found=f"{samples} samples",
        fix=f"--batch-size {max(1, samples // arguments.world_size)}, or leave dataloader_drop_last out",
    )


def require_pictures(config: TrainConfig, samples: Samples, cache: Container[str] | None) -> None:
    """Refuse L_VSD where no sample feeds it; text alone has nothing to switch.

    Args:
        cache: of a sample that is not in it, L_CE alone is computed; None: of all samples everything is.

    Raises:
        CachekdError: none of them has a picture, as their records tell.
    """
    if config.lambda_vsd == 0:
        return
    if has_pictures(samples, cache):
        return
    distilled = sum(cache is None or key in cache for key in samples.keys)
    raise CachekdError(
        "no sample feeds L_VSD: none has a picture",
        where=f"setting 'lambda_vsd', and {config.data}",
        expected="samples with pictures among those that are distilled",
        found=f"{distilled:,} of text alone",
        fix="--image-field NAME takes the pictures of another field; for text alone, --lambda-vsd 0",
    )


def has_pictures(samples: Samples, cache: Container[str] | None) -> bool:
    """Whether any of the samples that the cache has (None: of all) has a picture, as their records tell."""
    distilled = (index for index, key in enumerate(samples.keys) if cache is None or key in cache)
    return any(_has_picture(samples, index) for index in distilled)


def _has_picture(samples: Samples, index: int) -> bool:
    try:
        return samples.outline(index).images > 0
    except BadSample:  # which is met again when it is read
        return False


def open_cache(config: TrainConfig) -> LogitCache | None:
    """The cache, under the data's keys; None if none is used.

    Raises:
        CachekdError: it cannot be read, or was made with other settings of Kneedle.
    """
    if not config.distils or config.live_teacher:
        return None
    assert config.cache is not None  # as `require_inputs` saw
    cache = open_bound(config.cache, config.binding)
    codec = cache.manifest.codec
    for name, theirs in (("window", codec.window), ("min_k", codec.min_k)):
        ours = getattr(config, name)
        if ours not in (None, theirs):
            raise CachekdError(
                "the cache was made with another Kneedle setting",
                where=f"setting {name!r}",
                expected=f"{theirs}, as in {cache.path}",
                found=ours,
                fix=f"leave {name!r} out: a cache has its own",
            )
    return cache


def length_limits(config: TrainConfig, cache: LogitCache | None) -> Limits:
    """What the models that read the samples allow, and the settings."""
    said = length_settings(config, None if cache is None else dumped_data(cache))
    read_by = [config.student, *([str(config.teacher)] if config.runs_teacher else [])]
    return limits_of(map(load_config, read_by), **said)


def length_settings(config: TrainConfig, dumped: DataInfo | DataOptions | None) -> dict[str, Any]:
    """`max_tokens` and `too_long`; those that the run does not say are as in the dump.

    Args:
        dumped: of its cache, where it has one (see `dumped_data`).
    """
    said = config.model_dump(include={"max_tokens", "too_long"})
    return said if dumped is None else said | unsaid(config, dumped, *said)


def missing_in(
    cache: LogitCache, config: TrainConfig, samples: Samples, processor: Any, encoder: SampleEncoder
) -> dict[str, str]:
    """The samples that the cache lacks, key to why.

    Raises:
        CachekdError: it does not match the student's tokenizer, the template or the data; or the run would
            stop at them.
    """
    data = None if config.binding is not None else config
    choices = {"missing": config.missing, "on_error": config.on_error}
    return check_cache(cache, samples, processor, encoder, data=data, **choices).reasons


def check_the_teacher(
    config: TrainConfig, processor: Any, samples: Samples, cache: LogitCache | None
) -> None:
    """What its files say, without a model of them; their bytes are hashed last, as it takes longest.

    Raises:
        CachekdError: the pair cannot be switched, or has nothing to switch; it has other tokens or another
            template; or the cache is of another teacher.
    """
    assert config.teacher is not None  # as `require_inputs` saw
    if config.lambda_vsd > 0 and config.switch_bridge is None:
        check_switch(load_config(config.teacher), load_config(config.student))
    theirs = load_processor(config.teacher)
    check_tokenizers(theirs.tokenizer, processor.tokenizer)
    if config.live_teacher and SampleEncoder(theirs).template != SampleEncoder(processor).template:
        raise CachekdError(
            "teacher and student have different chat templates",
            where=f"{config.teacher} and {config.student}",
            fix="save the teacher's chat_template.jinja beside the student's processor",
        )
    require_pictures(config, samples, cache)
    if cache is not None:
        check_teacher(cache, config.teacher)
