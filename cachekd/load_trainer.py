"""A run's models, loaded, and the Trainer with all of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed

from cachekd.config import TrainConfig
from cachekd.errors import about
from cachekd.fingerprint import image_processor_fingerprint
from cachekd.lean import load_student, recompute_frozen_layers
from cachekd.open_run import OpenRun, open_run
from cachekd.run_folder import settings_of
from cachekd.samples import SampleEncoder
from cachekd.trainer import SwitchKDTrainer
from cachekd.trainer_settings import explained
from cachekd.training_data import TrainingSamples
from cachekd.validation.run import Validation
from cachekd.vlm import (
    LiveTeacher,
    SwitchBridge,
    SwitchedTeacher,
    dtype_of,
    load_config,
    load_processor,
    plan_bridge,
    vocabulary_of,
)

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
    bridge = switch_bridge(config)
    teacher_encoder = encoder_for_teacher(config, bridge, opened.encoder)
    validation = None
    if opened.held_out is not None:
        phase("reading the held-out data")
        with about("eval_data"):
            validation = Validation.of(opened.held_out, teacher_encoder)
            validation.read(opened.arguments)
    teacher = None
    if config.runs_teacher:
        phase("loading the teacher")
        teacher = load_teacher(config, opened.arguments.device)
    live = live_teacher(config, teacher) if config.live_teacher and teacher is not None else None
    phase("loading the student")
    set_seed(config.seed)  # adapters begin at random
    student = load_student(config, opened.arguments.device)
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


def load_teacher(config: TrainConfig, device: torch.device) -> SwitchedTeacher:
    """P_T, L_T and the head; the vision encoder too, if the teacher is live."""
    teacher = SwitchedTeacher.load(
        str(config.teacher),
        dtype=dtype_of(config.dtype, device),
        device=device,
        quantization=config.teacher_quantization,
        with_tower=config.live_teacher,
    )
    if config.gradient_checkpointing:
        recompute_frozen_layers(teacher.model)
    return teacher


def switch_bridge(config: TrainConfig) -> SwitchBridge | None:
    """The bridge between V_S and P_T, where one is asked for; what it is goes into the log.

    Raises:
        CachekdError: it is not needed, or not sound for this pair.
    """
    if config.switch_bridge is None:
        return None
    plan = plan_bridge(load_config(str(config.teacher)), load_config(config.student))
    bridge = SwitchBridge(plan, config.seed)
    log.warning(
        "L_VSD runs through a trained bridge, which is beyond the paper: %s, %s parameters",
        plan,
        f"{bridge.describe()['parameters']:,}",
    )
    return bridge


def live_teacher(config: TrainConfig, teacher: SwitchedTeacher) -> LiveTeacher:
    """The teacher in the cache's place."""
    own = load_processor(str(config.teacher))
    return LiveTeacher(
        teacher,
        vocab_size=vocabulary_of(teacher.model, own.tokenizer),
        window=config.window or 128,
        min_k=config.min_k or 2,
    )


def encoder_for_teacher(
    config: TrainConfig, bridge: SwitchBridge | None, encoder: SampleEncoder
) -> SampleEncoder | None:
    """The teacher's own, where a live one prepares images in another way than the student, or where behind a
    bridge an image has another number of places in its text; None where it reads what the student reads."""
    live = config.live_teacher and config.runs_teacher
    if not live and (bridge is None or not bridge.plan.other_text):
        return None
    own = load_processor(str(config.teacher))
    same = image_processor_fingerprint(own) == image_processor_fingerprint(encoder.processor)
    if same and (bridge is None or not bridge.plan.other_text):
        return None
    return SampleEncoder(own, encoder.limits)
