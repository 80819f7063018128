"""What to change when memory ran out in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.models.memory import memory_that_ran_out


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
    if config.batch_size > 1:
        half, twice = config.batch_size // 2, config.gradient_accumulation * 2
        knobs.append(f"--batch-size {half} --gradient-accumulation {twice} (the same steps)")
    if config.live_teacher:
        knobs.append("a cache instead of --live-teacher")
    if config.teacher is not None and config.switches and config.teacher_quantization is None:
        knobs.append("teacher_quantization: {load_in_4bit: true} in the YAML")
    if len(config.trainable) > 1:
        knobs.append(_fewer_parts(config))
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
