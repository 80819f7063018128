"""What a training run reads, opened and checked before any model's weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cachekd.cache import LogitCache
from cachekd.check.data import RunModels, length_limits, open_cache, without_missing
from cachekd.check.data_rows import pictures_row
from cachekd.check.rows import Row, cache_teacher_row, require, switch_rows, template_row, vocabulary_row
from cachekd.config import TrainConfig
from cachekd.data import SampleEncoder, Samples, open_samples
from cachekd.data.left_out import LeftOutSamples
from cachekd.errors import CachekdError
from cachekd.lean import check_lean_settings
from cachekd.models import ModelFiles
from cachekd.training_arguments import SwitchKDTrainingArguments
from cachekd.validation.data import HeldOut, open_held_out


@dataclass(frozen=True)
class OpenRun:
    """What a run reads, checked as far as it can be without any model's weights in memory.

    Attributes:
        samples: to train on.
        models: the student within the limits of these samples.
        missing: that the cache lacks and that are left out of them.
        held_out: to evaluate while the student trains.
    """

    samples: Samples
    models: RunModels
    cache: LogitCache | None
    arguments: SwitchKDTrainingArguments
    missing: LeftOutSamples
    held_out: HeldOut | None = None

    @property
    def encoder(self) -> SampleEncoder:
        """What makes the student's inputs of samples."""
        return self.models.student.encoder


def open_run(config: TrainConfig, checkpoints: Path, phase: Callable[[str], None]) -> OpenRun:
    """Data, cache, processors and settings; whatever can be refused is refused before weights are loaded.

    Raises:
        CachekdError: what does not go together, or a run of no steps.
    """
    config.require_inputs()
    phase("reading the settings")
    arguments = checked_arguments(config, checkpoints)
    phase("opening the data")
    samples = open_samples(config)
    if config.distils and not config.live_teacher:
        phase("opening the cache")
    cache = open_cache(config)
    models = RunModels.of(config)
    models = models._replace(student=models.student.within(length_limits(config, cache, models)))
    samples, missing = without_missing(config, samples, cache, models.student.encoder)
    require_steps(len(samples), arguments)
    if models.teacher is not None:
        phase("comparing the teacher with the student and the cache")
        require(teacher_rows(config, models.student, models.teacher, samples, cache))
    held_out = open_held_out(config, models, cache, phase)
    return OpenRun(samples, models, cache, arguments, missing, held_out)


def checked_arguments(config: TrainConfig, checkpoints: Path) -> SwitchKDTrainingArguments:
    """The Trainer's settings, and those that peft and transformers get, checked.

    Raises:
        CachekdError: one of the three refuses a setting; or several GPUs for one process.
    """
    arguments = SwitchKDTrainingArguments.of(config, checkpoints)
    check_lean_settings(config)
    return arguments


def require_steps(samples: int, arguments: SwitchKDTrainingArguments) -> None:
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


def teacher_rows(
    config: TrainConfig,
    student: ModelFiles,
    teacher: ModelFiles,
    samples: Samples | None,
    cache: LogitCache | None,
) -> Iterator[Row]:
    """What has to fit of a teacher that runs in training, as its files tell; its weights are hashed last, as
    it takes longest.

    Args:
        samples: None where they are not opened, as in a pipeline those of a hub.
        cache: None where there is none, or not yet.
    """
    if config.switches:
        yield from switch_rows(teacher, student, config.switch_bridge)
    yield vocabulary_row(teacher, student)
    if config.live_teacher:
        yield template_row(teacher, student)
    if config.switches and samples is not None:
        yield pictures_row(config.data, samples, cache)
    if cache is not None:
        yield cache_teacher_row(cache, teacher)
