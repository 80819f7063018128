"""What can go wrong in the middle of training, said so that it can be mended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError

if TYPE_CHECKING:
    from cachekd.trainer import SwitchKDTrainer


def stop_if_not_finite(
    trainer: SwitchKDTrainer,
    loss: Tensor,
    terms: dict[str, Tensor],
    keys: list[str],
    inputs: dict[str, Any],
) -> None:
    """Refuse to train on: one such step and every weight is NaN.

    What it takes to see it again goes into one file: the batch, its targets, the terms and the weights.

    Raises:
        CachekdError: the loss is NaN or infinite; samples, terms and the file are named.
    """
    if torch.isfinite(loss):
        return
    step = trainer.state.global_step
    values = {name: float(term) for name, term in terms.items()}
    path = Path(trainer.args.output_dir) / f"not-finite-step-{step}-process-{trainer.args.process_index}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = trainer.vlm.state_dict()
    bridge = {} if trainer.bridge is None else {"switch_bridge": trainer.bridge.state_dict()}
    torch.save(
        {"step": step, "terms": values, "keys": keys, "inputs": inputs, "student": weights} | bridge, path
    )
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    raise CachekdError(
        "the loss is not finite",
        where=f"step {step + 1}, samples {', '.join(map(repr, keys))}",
        expected="finite terms",
        found=", ".join(f"{name} {value:g}" for name, value in values.items())
        + (f"; the student's weights are not finite already, first {broken[0]}" if broken else ""),
        fix=(
            "lower --learning-rate, raise --warmup" if broken else "look at these samples, or --dtype float32"
        )
        + f"; batch, targets and weights are in {path}: torch.load(path, weights_only=False)",
    )


@contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Turn out-of-memory errors into which knob to turn, the cheapest first.

    Raises:
        CachekdError: memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if type(error) is RuntimeError and "can't allocate memory" not in text:
            raise
        raise CachekdError(
            "out of memory",
            where="stage two, on " + ("the GPU" if isinstance(error, torch.OutOfMemoryError) else "the CPU"),
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
    if config.teacher is not None and config.lambda_vsd > 0 and config.teacher_quantization is None:
        knobs.append("teacher_quantization: {load_in_4bit: true} in the YAML")
    if len(config.trainable) > 1:
        knobs.append(_fewer_parts(config))
    if config.lora is None:
        knobs.append("training: {optim: adamw_8bit} or lora: {r: 16, target_modules: all-linear} in the YAML")
    knobs.append("--logit-chunk 32")
    return knobs


def _fewer_parts(config: TrainConfig) -> str:
    """Frozen weights have neither gradients nor moments; the language model has most of them."""
    if config.lambda_vsd > 0:
        return "--trainable vision_encoder,projector (no gradients and moments of the language model)"
    return "--trainable projector (gradients and moments of that part alone)"
