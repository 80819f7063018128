"""What a training run reads, opened and checked before any model's weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cachekd.cache import LogitCache
from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.left_out import LeftOutSamples
from cachekd.matching import check_teacher
from cachekd.open_data import has_pictures, length_limits, open_cache, without_missing
from cachekd.samples import SampleEncoder, Samples, open_samples
from cachekd.training_arguments import require_one_gpu, training_arguments
from cachekd.validation.data import HeldOut, open_held_out
from cachekd.vlm import check_switch, check_tokenizers, load_config, load_processor


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
    phase("reading the settings")
    arguments = training_arguments(config, checkpoints)
    require_one_gpu(arguments)
    phase("opening the data")
    samples = open_samples(config)
    if config.distils and not config.live_teacher:
        phase("opening the cache")
    cache = open_cache(config)
    processor = load_processor(config.student)
    encoder = SampleEncoder(processor, length_limits(config, cache))
    samples, missing = without_missing(config, samples, cache, processor, encoder)
    require_steps(len(samples), arguments)
    if config.runs_teacher:
        phase("comparing the teacher with the student and the cache")
        check_the_teacher(config, processor, samples, cache)
    held_out = open_held_out(config, processor, cache, phase)
    return OpenRun(samples, processor, encoder, cache, arguments, missing, held_out)


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
    if not config.switches:
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


def check_the_teacher(
    config: TrainConfig, processor: Any, samples: Samples, cache: LogitCache | None
) -> None:
    """What its files say, without a model of them; their bytes are hashed last, as it takes longest.

    Raises:
        CachekdError: the pair cannot be switched, or has nothing to switch; it has other tokens or another
            template; or the cache is of another teacher.
    """
    assert config.teacher is not None  # as `require_inputs` saw
    if config.switches and config.switch_bridge is None:
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
