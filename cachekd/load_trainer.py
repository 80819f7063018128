"""A run's models, loaded, and the Trainer with all of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed

from cachekd.check.data import RunModels
from cachekd.config import TrainConfig
from cachekd.data import SampleEncoder
from cachekd.errors import about
from cachekd.lean import load_student, recompute_frozen_layers
from cachekd.models import (
    LiveTeacher,
    ModelFiles,
    SwitchBridge,
    SwitchedTeacher,
    dtype_of,
    plan_bridge,
    vocabulary_of,
)
from cachekd.open_run import OpenRun, open_run
from cachekd.run_folder import settings_of
from cachekd.trainer import SwitchKDTrainer
from cachekd.training_arguments import explained
from cachekd.training_data import TrainingSamples
from cachekd.validation.run import Validation

log = logging.getLogger(__name__)


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


def load_trainer(
    config: TrainConfig,
    opened: OpenRun,
    callbacks: list[TrainerCallback] | None,
    phase: Callable[[str], None],
) -> SwitchKDTrainer:
    """The models' weights, and the Trainer with all of it."""
    models = opened.models
    bridge = switch_bridge(config, models)
    teacher_encoder = encoder_for_teacher(config, bridge, models)
    validation = None
    if opened.held_out is not None:
        phase("reading the held-out data")
        with about("eval_data"):
            validation = Validation.of(opened.held_out, teacher_encoder)
            validation.read(opened.arguments)
    teacher, live = None, None
    if models.teacher is not None:
        phase("loading the teacher")
        teacher = load_teacher(config, models.teacher, opened.arguments.device)
        live = live_teacher(config, models.teacher, teacher) if config.live_teacher else None
    phase("loading the student")
    set_seed(config.seed)  # adapters begin at random
    student = load_student(config, models.student, opened.arguments.device)
    data = TrainingSamples(
        opened.samples, opened.encoder, opened.cache, teacher_encoder, on_error=config.on_error
    )
    phase("reading the first sample")
    with explained(config.training):
        trainer = SwitchKDTrainer(
            student,
            opened.arguments,
            data,
            pad_token_id=opened.encoder.pad_token_id,
            encoder=opened.encoder,
            teacher=teacher,
            live=live,
            bridge=bridge,
            weights=config.weights,
            vsd_every=config.vsd_every,
            temperature=config.temperature,
            logit_chunk=config.logit_chunk,
            callbacks=callbacks,
            validation=validation,
            settings=settings_of(config),
        )
        # Some look for their modules in the model.
        trainer.get_optimizer_cls_and_kwargs(opened.arguments, student)
    return trainer


def load_teacher(config: TrainConfig, files: ModelFiles, device: torch.device) -> SwitchedTeacher:
    """P_T, L_T and the head; the vision encoder too, if the teacher is live."""
    weights = files.load(
        dtype=dtype_of(config.dtype, device),
        device=device,
        quantization=config.teacher_quantization,
        tower=config.live_teacher,
    )
    teacher = SwitchedTeacher(weights)
    if config.gradient_checkpointing:
        recompute_frozen_layers(teacher.model)  # after its eval mode, which would end that
    return teacher


def switch_bridge(config: TrainConfig, models: RunModels) -> SwitchBridge | None:
    """The bridge between V_S and P_T, where one is asked for; what it is goes into the log.

    Raises:
        CachekdError: it is not needed, or not sound for this pair.
    """
    if config.switch_bridge is None or models.teacher is None:
        return None
    plan = plan_bridge(models.teacher.config, models.student.config)
    bridge = SwitchBridge(plan, config.seed)
    log.warning(
        "L_VSD runs through a trained bridge, which is beyond the paper: %s, %s parameters",
        plan,
        f"{bridge.describe()['parameters']:,}",
    )
    return bridge


def live_teacher(config: TrainConfig, files: ModelFiles, teacher: SwitchedTeacher) -> LiveTeacher:
    """The teacher in the cache's place."""
    return LiveTeacher(
        teacher,
        vocab_size=vocabulary_of(teacher.model, files.processor.tokenizer),
        window=config.window or 128,
        min_k=config.min_k or 2,
    )


def encoder_for_teacher(
    config: TrainConfig, bridge: SwitchBridge | None, models: RunModels
) -> SampleEncoder | None:
    """The teacher's own, where a live one prepares images in another way than the student, or where behind a
    bridge an image has another number of places in its text; None where it reads what the student reads."""
    student, teacher = models
    if teacher is None:
        return None
    other_text = bridge is not None and bridge.plan.other_text
    other_images = config.live_teacher and teacher.image_processing != student.image_processing
    return teacher.within(student.limits).encoder if other_text or other_images else None
