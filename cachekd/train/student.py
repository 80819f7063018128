"""Training in less memory: recomputed layers, adapters, quantised weights, by transformers and peft; and what
to change when it ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.models import ModelFiles, check_adapters, train_only
from cachekd.models.adapters import lora_config, with_adapters
from cachekd.models.memory import memory_that_ran_out
from cachekd.models.quantization import in_checkpoint, quantization_config


def load_student(config: TrainConfig, files: ModelFiles, device: torch.device) -> nn.Module:
    """The student in `student_dtype`, or quantised; inside peft's wrapper if it trains adapters. What is not
    to be trained requires no gradient, and so is in no optimizer.

    Raises:
        CachekdError: quantised weights without adapters to train, peft is not installed, or it refuses the
            settings; adapters outside the parts that train.
    """
    student = files.load(
        dtype=getattr(torch, config.student_dtype),
        device=device,
        quantization=config.student_quantization,
        attn_implementation=config.student_attn_implementation,
    )
    if config.lora is None:
        train_only(student, config.trainable)
        return student
    adapted = with_adapters(student, config.lora, config.trainable)
    check_adapters(student, config.trainable, config.switched)
    return adapted


def check_peft_settings(config: TrainConfig) -> None:
    """Refuse settings that peft or transformers would refuse once the weights are loaded.

    Raises:
        CachekdError: quantised weights without adapters to train, peft is not installed, or no such setting.
    """
    if config.student_quantization is not None and config.lora is None:
        raise _untrainable("setting 'student_quantization'")
    for settings in (config.student_quantization, config.teacher_quantization):
        if settings is not None:
            quantization_config(settings)
    if config.lora is not None:
        lora_config(config.lora)


def require_adapters(config: TrainConfig, files: ModelFiles) -> None:
    """Refuse a student whose checkpoint is quantised, if no adapters train on it.

    Raises:
        CachekdError: it is.
    """
    if config.lora is None and in_checkpoint(files.config) is not None:
        raise _untrainable(f"the student's checkpoint, {files.path}")


def _untrainable(where: str) -> CachekdError:
    return CachekdError(
        "quantised weights cannot be trained",
        where=where,
        fix="train adapters on them: lora: {r: 16, target_modules: all-linear}",
    )


def save_merged(files: ModelFiles, adapter: Path, out: Path) -> None:
    """The saved adapters, added to the student's own float32 weights: a plain model in `out`."""
    from peft import PeftModel

    student = files.load(dtype=torch.float32, device=torch.device("cpu"))
    PeftModel.from_pretrained(student, adapter).merge_and_unload().save_pretrained(out)


@contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Turn out-of-memory errors into which knob to turn, the cheapest first. Other errors go on unchanged.

    Raises:
        CachekdError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        device = memory_that_ran_out(error)
        if device is None:
            raise
        text = str(error)
        raise CachekdError(
            "out of memory",
            where=f"stage two, on the {device}",
            found=text.splitlines()[0] if text else None,
            fix="; or ".join(_knobs(config)) + ". `cachekd train --estimate` shows what needs how much",
        ) from error


def _knobs(config: TrainConfig) -> list[str]:
    knobs = []
    if not config.gradient_checkpointing:
        knobs.append("--gradient-checkpointing (a third slower)")
    twice = config.gradient_accumulation * 2
    if config.batch_tokens is not None and config.batch_tokens > 1:
        knobs.append(f"--batch-tokens {config.batch_tokens // 2} --gradient-accumulation {twice} (a new run)")
    elif config.most_samples > 1:
        half = config.most_samples // 2
        knobs.append(f"--batch-size {half} --gradient-accumulation {twice} (the same steps)")
    if config.live_teacher:
        knobs.append("a cache instead of --live-teacher")
    if config.teacher is not None and config.switches and config.teacher_quantization is None:
        knobs.append("--teacher-quantization 4bit")
    whole = config.teacher_quantization is None and config.teacher_load_settings["device_map"] is None
    if config.runs_teacher and whole:
        knobs.append("--teacher-device-map auto --teacher-max-memory 0=4GB (layers are fetched: slower)")
    if len(config.trainable) > 1:
        knobs.append(_fewer_parts(config))
    if config.student_dtype == "float32" and config.dtype != "float16":
        knobs.append("--student-dtype bfloat16")
    if config.lora is None:
        knobs.append(
            "training: {optim: adamw_8bit} (with bitsandbytes) or lora: {r: 16, target_modules: all-linear} "
            "in the YAML"
        )
    knobs.append("--logit-chunk 32")
    return knobs


def _fewer_parts(config: TrainConfig) -> str:
    """Frozen weights have neither gradients nor moments; the language model has most of them."""
    if config.switches:
        return "--trainable vision_encoder,projector (no gradients and moments of the language model)"
    return "--trainable projector (gradients and moments of that part alone)"
