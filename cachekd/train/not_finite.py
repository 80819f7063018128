"""A loss, a gradient or a weight that is not finite stops the run, and says what it takes to see it again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from cachekd.errors import CachekdError, is_failed_write, what_failed
from cachekd.train.batch import Batch

if TYPE_CHECKING:
    from cachekd.train.trainer import SwitchKDTrainer

HUGE = 1e4  # no weight of a trained model is near it; what has grown to it overflows in the next forward
BOLD = 0.01  # AdamW moves every weight by about the learning rate in a step
_SLOWER = "lower --learning-rate, or raise --warmup"


@dataclass(frozen=True)
class Computed:
    """A batch whose gradients are in an optimizer step that is still to come.

    Attributes:
        loss: scalar, before it is divided by the step's answer tokens.
        terms: scalars, likewise.
        batch: as the Trainer gave it.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    batch: Batch


def stop_if_not_finite(trainer: SwitchKDTrainer, batches: Sequence[Computed], grad_norm: Any) -> None:
    """Refuse an optimizer step after which every weight would be NaN. One look at the device for all of it.

    What it takes to see it again goes into one file: the batches, their targets and terms, the weights.

    Args:
        batches: of this step, in this process.
        grad_norm: of the step. With a loss scaler (float16) it may be infinite: the scaler leaves such a
            step out by itself.

    Raises:
        CachekdError: a loss or the gradient is NaN or infinite; samples, terms and the file are named.
    """
    losses = torch.stack([batch.loss.float() for batch in batches])
    norm = grad_norm if type(grad_norm) is Tensor else torch.tensor(float(grad_norm or 0.0))
    *fine, norm_is_fine = torch.cat([losses, norm.to(losses).reshape(1)]).isfinite().tolist()
    bad = [batch for batch, finite in zip(batches, fine, strict=True) if not finite]
    if bad:
        _stop(trainer, "the loss is not finite", bad[:1], "finite terms")
    if not norm_is_fine and trainer.accelerator.scaler is None:
        _stop(trainer, "the gradient is not finite", batches, "a finite gradient of finite terms")


def stop_if_weights_not_finite(trainer: SwitchKDTrainer) -> None:
    """Refuse to save what is no model.

    Raises:
        CachekdError: a weight is NaN or infinite; the first such tensor is named.
    """
    name, size = _largest(trainer)
    if not math.isfinite(size):
        raise CachekdError(
            "the student's weights are not finite",
            where=f"{name}, after step {trainer.state.global_step}",
            found=_rate(trainer),
            fix=f"nothing of them was saved; {_SLOWER}",
        )


def _stop(trainer: SwitchKDTrainer, problem: str, batches: Sequence[Computed], expected: str) -> NoReturn:
    step = trainer.state.global_step
    rows = [{name: float(term) for name, term in batch.terms.items()} for batch in batches]
    path = Path(trainer.args.output_dir) / f"not-finite-step-{step}-process-{trainer.args.process_index}.pt"
    bridge = {} if trainer.bridge is None else {"switch_bridge": trainer.bridge.state_dict()}
    keys = [key for each in batches for key in each.batch.keys]
    saved = [
        {"keys": each.batch.keys, "terms": row, "batch": each.batch}
        for each, row in zip(batches, rows, strict=True)
    ]
    kept = _save({"step": step, "batches": saved, "student": trainer.vlm.state_dict()} | bridge, path)
    name, size = _largest(trainer)
    terms = [", ".join(f"{term} {value:g}" for term, value in row.items()) for row in rows]
    raise CachekdError(
        problem,
        where=f"step {step + 1}, samples {', '.join(map(repr, keys))}",
        expected=expected,
        found="; ".join([*terms, _rate(trainer), f"largest |weight| {size:g}, in {name}"]),
        fix=f"{_advice(trainer, size)}; {kept}",
    )


def _save(content: dict[str, Any], path: Path) -> str:
    """Keep it for whoever looks into it; say where it is, or why it is not, as on a full disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    except (OSError, RuntimeError) as error:
        if not is_failed_write(error):
            raise
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return f"batches, targets and weights could not be saved: {what_failed(error)}"
    return f"batches, targets and weights are in {path}: torch.load(path, weights_only=False)"


def _advice(trainer: SwitchKDTrainer, largest: float) -> str:
    args = trainer.args
    if not largest <= HUGE:  # NaN is not
        return f"{_SLOWER}: weights this large are a run that diverged"
    advice = "look at these samples"
    if args.learning_rate >= BOLD:
        advice = f"{_SLOWER}; or {advice}"
    if args.fp16:
        advice += "; or --dtype bfloat16, whose range is that of float32"
    elif args.bf16:
        advice += "; or --dtype float32"
    return advice


def _rate(trainer: SwitchKDTrainer) -> str:
    now = float(trainer.optimizer.param_groups[0]["lr"])
    return f"learning rate {now:g} of at most {trainer.args.learning_rate:g}"


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
