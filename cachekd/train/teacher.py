"""The teacher that runs in training: for the switched path, or live in a cache's place."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel

from cachekd.cache import LogitCache
from cachekd.check.data import RunModels
from cachekd.check.match import check_quantization
from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.losses.terms import labels
from cachekd.models import (
    LiveTeacher,
    ModelFiles,
    SwitchBridge,
    SwitchedTeacher,
    dtype_of,
    language_model,
    vocabulary_of,
)
from cachekd.models.placement import is_offloaded, layers_of

log = logging.getLogger(__name__)


def say_how_it_is_quantised(
    config: TrainConfig, teacher: ModelFiles, cache: LogitCache | None, device: torch.device
) -> None:
    """Log it where the teacher that runs is quantised otherwise than the cache's.

    Raises:
        CachekdError: `check_quantization` refuses that; or the teacher cannot be quantised so.
    """
    ours = teacher.quantization(config.teacher_quantization, dtype_of(config.dtype, device))
    if cache is not None:
        theirs, accept = cache.manifest.teacher.quantization, config.teacher_mismatch == "accept"
        if (said := check_quantization(theirs, ours, str(cache.path), accept=accept)) is not None:
            log.warning("%s", said)


def load_teacher(config: TrainConfig, files: ModelFiles, device: torch.device) -> SwitchedTeacher:
    """P_T, L_T and the head; the vision encoder too, if the teacher is live."""
    weights = files.load(
        dtype=dtype_of(config.dtype, device),
        device=device,
        tower=config.live_teacher,
        **config.teacher_load_settings,
    )
    if not config.gradient_checkpointing:
        require_at_hand(weights)
    teacher = SwitchedTeacher(weights)
    if config.gradient_checkpointing:
        recompute_frozen_layers(teacher.model)  # after its eval mode, which would end that
    return teacher


def recompute_frozen_layers(teacher: PreTrainedModel) -> int:
    """Gradient checkpointing for the frozen teacher's language model, which the switched path runs through.

    transformers' own switch does nothing in eval mode, and train mode would turn dropout on. So the layers
    alone are marked as training, not what is in them.

    Returns:
        the number of layers.
    """
    # A layer that was fetched is let go at its end, which a recomputation that stops early does not reach.
    recompute = partial(_checkpoint_to_the_end if is_offloaded(teacher) else checkpoint, use_reentrant=False)
    layers: Any = layers_of(language_model(teacher)).values()
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = recompute
        layer.training = True
    return len(layers)


def _checkpoint_to_the_end(*args: Any, **kwargs: Any) -> Any:
    with set_checkpoint_early_stop(False):
        return checkpoint(*args, **kwargs)


def require_at_hand(teacher: PreTrainedModel) -> None:
    """Refuse layers that are fetched for their turn where they are not recomputed: for the backward all would
    stay in memory.

    Raises:
        CachekdError: there are some.
    """
    if is_offloaded(teacher):
        raise CachekdError(
            "a teacher with layers off its device needs gradient checkpointing: without it every layer "
            "that was fetched in the forward stays in memory until the backward",
            where="settings 'teacher_device_map' and 'gradient_checkpointing'",
            fix="--gradient-checkpointing",
        )


def switch_bridge(config: TrainConfig, models: RunModels) -> SwitchBridge | None:
    """The bridge between V_S and P_T, where one is asked for; what it is goes into the log.

    Raises:
        CachekdError: it is not needed, or not sound for this pair.
    """
    if config.switch_bridge is None or models.teacher is None:
        return None
    plan = models.bridge_plan()
    bridge = SwitchBridge(plan, config.seed)
    log.warning(
        "%s runs through a trained bridge, which is beyond the paper: %s, %s parameters",
        labels(config.switched),
        plan,
        f"{bridge.summary()['parameters']:,}",
    )
    return bridge


def live_teacher(files: ModelFiles, teacher: SwitchedTeacher) -> LiveTeacher:
    """Put the teacher in the cache's place."""
    return LiveTeacher(teacher, vocab_size=vocabulary_of(teacher.model, files.processor.tokenizer))


def reading_teacher(
    config: TrainConfig, bridge: SwitchBridge | None, models: RunModels, *, across: bool
) -> ModelFiles | None:
    """The teacher, where it reads samples by itself: across tokenizers; a live one that prepares images in
    another way than the student; or one behind a bridge whose images have another number of places in its
    text. None where it reads what the student reads.

    Args:
        models: within their limits.
    """
    student, teacher = models
    if teacher is None or across:
        return teacher
    other_text = bridge is not None and bridge.plan.other_text
    other_images = config.live_teacher and teacher.image_processing != student.image_processing
    return teacher if other_text or other_images else None
