"""What a run opens and loads, and checks before it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import TrainerCallback, set_seed

from cachekd.cache import LogitCache
from cachekd.check.data import RunModels, checked_cache
from cachekd.check.data_rows import pictures_row
from cachekd.check.rows import Row, cache_teacher_row, require, switch_rows, vocabulary_row
from cachekd.check.text import require_text_alike
from cachekd.config import TrainConfig
from cachekd.data import SampleEncoder, Samples, open_samples
from cachekd.data.left_out import LeftOutSamples
from cachekd.errors import CachekdError, about
from cachekd.losses import loss_function
from cachekd.losses.terms import labels
from cachekd.models import ModelFiles
from cachekd.models.fingerprint import reads_otherwise
from cachekd.train.across import AcrossTokenizers, across_tokenizers, say_how_vocabularies_meet
from cachekd.train.arguments import SwitchKDTrainingArguments, explained
from cachekd.train.data import TrainingSamples
from cachekd.train.held_out import HeldOut, open_held_out
from cachekd.train.rounding import check_rounding
from cachekd.train.student import check_peft_settings, load_student, require_adapters
from cachekd.train.teacher import (
    live_teacher,
    load_teacher,
    reading_teacher,
    say_how_it_is_quantised,
    switch_bridge,
)
from cachekd.train.terms import LossTerms, TermLoss
from cachekd.train.trainer import SwitchKDTrainer
from cachekd.train.validation import Validation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenRun:
    """What a run reads, checked as far as it can be without any model's weights in memory.

    Attributes:
        samples: to train on.
        models: within the limits of these samples.
        missing: that the cache lacks and that are left out of them.
        across: that teacher and student have different tokenizers; None: both read text alike.
        held_out: to evaluate while the student trains.
    """

    samples: Samples
    models: RunModels
    cache: LogitCache | None
    arguments: SwitchKDTrainingArguments
    missing: LeftOutSamples
    across: AcrossTokenizers | None = None
    held_out: HeldOut | None = None

    @property
    def aligns(self) -> bool:
        """Whether answers are aligned: across tokenizers, the student's own logits are compared."""
        return self.across is not None and self.across.pair is not None

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
    models = RunModels.of(config)
    require_adapters(config, models.student)
    cache, models, missing, across = checked = checked_cache(config, models, samples)
    samples = checked.used(samples)
    require_steps(len(samples), arguments)
    say_what_is_spread_evenly(config, cache)
    check_attention(config, models)
    if models.teacher is not None:
        phase("comparing the teacher with the student and the cache")
        models.teacher.require_device_map(config.teacher_load_settings["device_map"])
        say_how_it_is_quantised(config, models.teacher, cache, arguments.device)
        require(teacher_rows(config, models.student, models.teacher, samples, cache))
    if across:
        phase("comparing both vocabularies")
    tokenizers = across_tokenizers(config, models, cache, across=across)
    say_how_vocabularies_meet(config, tokenizers, cache)
    held_out = open_held_out(config, models, cache, phase)
    return OpenRun(samples, models, cache, arguments, LeftOutSamples.of(missing), tokenizers, held_out)


def say_what_is_spread_evenly(config: TrainConfig, cache: LogitCache | None) -> None:
    """Log it where a loss asks for the teacher's whole distribution, and the cache has no sketch of it."""
    whole = [name for name, loss in config.losses.items() if loss.everywhere]
    if whole and cache is not None and not cache.manifest.sketches:
        log.warning(
            "%s: the loss asks for the teacher's whole distribution, and the cache has no tail sketch: what "
            "it does not keep counts as spread evenly",
            labels(whole),
        )


def checked_arguments(config: TrainConfig, checkpoints: Path) -> SwitchKDTrainingArguments:
    """The Trainer's settings, and those that peft and transformers get, checked.

    Raises:
        CachekdError: one of the three refuses a setting; or several GPUs for one process.
    """
    arguments = SwitchKDTrainingArguments.of(config, checkpoints)
    check_peft_settings(config)
    if config.student_dtype == "bfloat16":
        check_rounding(config, arguments)
    return arguments


def check_attention(config: TrainConfig, models: RunModels) -> None:
    """Refuse what `attn_implementation` cannot be of a model.

    Raises:
        CachekdError: the setting is named.
    """
    for whose, files in models._asdict().items():
        if files is not None:
            with about(setting := f"{whose}_attn_implementation"):
                files.require_attention(getattr(config, setting))


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
    if cache is None and not config.crosses:
        yield Row.of("text", partial(require_text_alike, teacher, student))
    elif cache is not None and not reads_otherwise(cache.manifest.fingerprints, student.fingerprints):
        yield vocabulary_row(teacher, student)  # else the teacher was compared with the cache
    if config.switches and samples is not None:
        yield pictures_row(config.data, samples, cache, config.switched)
    if cache is not None:
        yield cache_teacher_row(cache, teacher)


def make_trainer(
    config: TrainConfig,
    checkpoints: Path,
    callbacks: list[TrainerCallback] | None = None,
    phase: Callable[[str], None] = lambda _: None,
) -> SwitchKDTrainer:
    """Everything read, checked and loaded, ready to train.

    Args:
        checkpoints: where the Trainer writes; it does not have to exist.
        phase: told what is read or loaded.
    """
    return load_trainer(config, open_run(config, checkpoints, phase), callbacks, phase)


def losses_of(config: TrainConfig) -> dict[str, TermLoss]:
    """The loss of each taught term that is on, with its settings, as a sum over answer tokens."""
    return {
        name: partial(loss_function(loss.loss), reduction="sum", **loss.arguments(dict(config)))
        for name, loss in config.losses.items()
    }


def load_trainer(
    config: TrainConfig,
    opened: OpenRun,
    callbacks: list[TrainerCallback] | None,
    phase: Callable[[str], None],
) -> SwitchKDTrainer:
    """The models' weights, and the Trainer with all of it."""
    models = opened.models
    bridge = switch_bridge(config, models)
    reader = reading_teacher(config, bridge, models, across=opened.across is not None)
    same_tiles = bridge is not None and bridge.plan.tiles
    validation = None
    if opened.held_out is not None:
        phase("reading the held-out data")
        with about("eval_data"):
            validation = Validation.of(
                opened.held_out, opened.across, teacher_reads=reader is not None, same_tiles=same_tiles
            )
            validation.read(opened.arguments)
    teacher, live = None, None
    if models.teacher is not None:
        phase("loading the teacher")
        teacher = load_teacher(config, models.teacher, opened.arguments.device)
        live = live_teacher(models.teacher, teacher) if config.live_teacher else None
    phase("loading the student")
    set_seed(config.seed)  # adapters begin at random
    student = load_student(config, models.student, opened.arguments.device)
    terms = LossTerms(
        student,
        config.weights,
        losses_of(config),
        teacher=teacher,
        live=live,
        bridge=bridge,
        vsd_every=config.vsd_every,
        logit_chunk=config.logit_chunk,
        across=opened.across,
    )
    data = TrainingSamples(
        opened.samples,
        opened.encoder,
        opened.cache,
        None if reader is None else reader.encoder,
        on_error=config.on_error,
        across=opened.across,
        same_tiles=same_tiles,
    )
    phase("reading the first sample")
    with explained(config.training):
        trainer = SwitchKDTrainer(
            terms,
            opened.arguments,
            data,
            pad_token_id=opened.encoder.pad_token_id,
            encoder=opened.encoder,
            callbacks=callbacks,
            validation=validation,
            settings=config.deciding(),
            log_term_gradients=config.log_term_gradients,
        )
        # Some look for their modules in the model.
        trainer.get_optimizer_cls_and_kwargs(opened.arguments, student)
    return trainer
