"""What can go wrong in the middle of training, said so that it can be mended."""

from __future__ import annotations

import math
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

HUGE = 1e4  # no weight of a trained model is near it; what has grown to it overflows in the next forward
BOLD = 0.01  # AdamW moves every weight by about the learning rate in a step
# What a failed allocation says; only some of them have a class of their own.
_NO_ROOM_ON_THE_GPU = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",  # cuDNN 9
)
_NO_ROOM_ON_THE_CPU = ("can't allocate memory", "DefaultCPUAllocator: not enough memory")


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
        CachekdError: the loss is NaN or infinite; samples, terms, the learning rate, the largest weight and
            the file are named.
    """
    if torch.isfinite(loss):
        return
    values = {name: float(term.detach()) for name, term in terms.items()}
    path = _save(trainer, {"terms": values, "keys": keys, "inputs": inputs})
    raise CachekdError(
        "the loss is not finite",
        where=f"step {trainer.state.global_step + 1}, samples {', '.join(map(repr, keys))}",
        expected="finite terms",
        found="; ".join([", ".join(f"{name} {value:g}" for name, value in values.items()), *_state(trainer)]),
        fix=f"{_advice(trainer)}; batch, targets and weights are in {path}: "
        "torch.load(path, weights_only=False)",
    )


def stop_if_gradient_not_finite(
    trainer: SwitchKDTrainer, grad_norm: Tensor | float, keys: list[str] | None = None
) -> None:
    """Refuse an optimizer step whose gradient is NaN or infinite: its loss may well be finite.

    Call it before the optimizer's step. In float16 the gradient scaler skips such steps by itself, so there
    it does nothing. Where the weights are finite still, they and the keys go into a file.

    Args:
        grad_norm: of all gradients, before they were clipped; a scalar.
        keys: of the samples of the step's batches, if they are known.

    Raises:
        CachekdError: it is not finite; step, samples, the learning rate and the largest weight are named.
    """
    if trainer.accelerator.scaler is not None or math.isfinite(float(grad_norm)):
        return
    step = trainer.state.global_step + 1
    fix = _advice(trainer)
    if math.isfinite(_largest(trainer)[1]):
        path = _save(trainer, {"grad_norm": float(grad_norm), "keys": keys})
        fix += f"; keys and weights are in {path}: torch.load(path, weights_only=False)"
    raise CachekdError(
        "the gradient is not finite",
        where=f"step {step}" + (f", samples {', '.join(map(repr, keys))}" if keys else ""),
        expected="a finite norm",
        found="; ".join([f"norm {float(grad_norm):g}", *_state(trainer)]),
        fix=fix,
    )


def _save(trainer: SwitchKDTrainer, what: dict[str, Any]) -> Path:
    """A file of `what`, the step and all weights, in the Trainer's folder."""
    args, step = trainer.args, trainer.state.global_step
    path = Path(args.output_dir) / f"not-finite-step-{step}-process-{args.process_index}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    bridge = {} if trainer.bridge is None else {"switch_bridge": trainer.bridge.state_dict()}
    torch.save({"step": step, "student": trainer.vlm.state_dict()} | what | bridge, path)
    return path


def _largest(trainer: SwitchKDTrainer) -> tuple[str, float]:
    """The first weight tensor that is not finite, with NaN or inf; else that of the largest |weight|."""
    name, largest = "", 0.0
    for each, weight in trainer.vlm.state_dict().items():
        if not weight.is_floating_point() or weight.numel() == 0:
            continue
        size = float(weight.detach().abs().max())
        if not math.isfinite(size):
            return each, size
        if size > largest:
            name, largest = each, size
    return name, largest


def _learning_rate(trainer: SwitchKDTrainer) -> float:
    optimizer = trainer.optimizer
    return trainer.args.learning_rate if optimizer is None else float(optimizer.param_groups[0]["lr"])


def _state(trainer: SwitchKDTrainer) -> list[str]:
    """What tells a learning rate that is too large from a bad sample."""
    name, size = _largest(trainer)
    rate = f"learning rate {_learning_rate(trainer):g} of at most {trainer.args.learning_rate:g}"
    if math.isfinite(size):
        return [rate, f"largest |weight| {size:g}, in {name}"]
    return [rate, f"the student's weights are not finite already, first {name}"]


def _advice(trainer: SwitchKDTrainer) -> str:
    size, args = _largest(trainer)[1], trainer.args
    slower = "lower --learning-rate, raise --warmup"
    if not math.isfinite(size):
        return slower
    if size > HUGE:
        return f"{slower}: weights this large are a run that diverged"
    advice = "look at these samples"
    if args.learning_rate >= BOLD:
        advice = f"{slower}; or {advice}"
    if args.fp16:
        advice += "; or --dtype bfloat16, whose range is that of float32"
    elif args.bf16:
        advice += "; or --dtype float32"
    return advice


@contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Turn out-of-memory errors into which knob to turn, the cheapest first. Other errors go on unchanged.

    Raises:
        CachekdError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        device = _out_of_memory_on(error)
        if device is None:
            raise
        text = str(error)
        raise CachekdError(
            "out of memory",
            where=f"stage two, on the {device}",
            found=text.splitlines()[0] if text else None,
            fix="; or ".join(_knobs(config)) + ". `cachekd train --estimate` shows what needs how much",
        ) from error


def _out_of_memory_on(error: Exception) -> str | None:
    """CPU or GPU; None if it is another error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(said in text for said in _NO_ROOM_ON_THE_GPU):
        return "GPU"
    if isinstance(error, MemoryError) or any(said in text for said in _NO_ROOM_ON_THE_CPU):
        return "CPU"
    return None


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
        knobs.append(
            "training: {optim: adamw_8bit} (with bitsandbytes) or lora: {r: 16, target_modules: all-linear} "
            "in the YAML"
        )
    knobs.append("--logit-chunk 32")
    return knobs


def _fewer_parts(config: TrainConfig) -> str:
    """Frozen weights have neither gradients nor moments; the language model has most of them."""
    if config.lambda_vsd > 0:
        return "--trainable vision_encoder,projector (no gradients and moments of the language model)"
    return "--trainable projector (gradients and moments of that part alone)"
