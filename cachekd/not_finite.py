"""Numbers that are not finite stop a run before they are in the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from cachekd.errors import CachekdError

if TYPE_CHECKING:
    from cachekd.trainer import SwitchKDTrainer

_GROWN = 1e3  # no weight of a sound model is as large


@dataclass(frozen=True)
class Computed:
    """A batch whose gradients are in an optimizer step that is still to come.

    Attributes:
        loss: scalar, before it is divided by the step's answer tokens.
        terms: scalars, likewise.
        keys: of the samples.
        inputs: the batch as the Trainer gave it.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    keys: list[str]
    inputs: dict[str, Any]


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
    *fine, steady = torch.cat([losses, norm.to(losses).reshape(1)]).isfinite().tolist()
    bad = [batch for batch, finite in zip(batches, fine, strict=True) if not finite]
    if bad:
        _stop(trainer, "the loss is not finite", bad[:1], "finite terms")
    if not steady and trainer.accelerator.scaler is None:
        _stop(trainer, "the gradient is not finite", batches, "a finite gradient of finite terms")


def stop_if_weights_not_finite(trainer: SwitchKDTrainer) -> None:
    """Refuse to save what is no model.

    Raises:
        CachekdError: a weight is NaN or infinite; the first such tensor is named.
    """
    broken = _broken(trainer)
    if broken:
        raise CachekdError(
            "the student's weights are not finite",
            where=f"after step {trainer.state.global_step}",
            found=f"{len(broken)} tensor(s), first {broken[0]}",
            fix="nothing of them was saved; " + _slower(trainer),
        )


def _stop(trainer: SwitchKDTrainer, problem: str, batches: Sequence[Computed], expected: str) -> NoReturn:
    step = trainer.state.global_step
    rows = [{name: float(term) for name, term in batch.terms.items()} for batch in batches]
    path = Path(trainer.args.output_dir) / f"not-finite-step-{step}-process-{trainer.args.process_index}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    bridge = {} if trainer.bridge is None else {"switch_bridge": trainer.bridge.state_dict()}
    saved = [
        {"keys": batch.keys, "terms": row, "inputs": batch.inputs}
        for batch, row in zip(batches, rows, strict=True)
    ]
    torch.save({"step": step, "batches": saved, "student": trainer.vlm.state_dict()} | bridge, path)
    raise CachekdError(
        problem,
        where=f"step {step + 1}, samples {', '.join(repr(key) for batch in batches for key in batch.keys)}",
        expected=expected,
        found="; ".join(", ".join(f"{name} {value:g}" for name, value in row.items()) for row in rows),
        fix=f"{_advice(trainer)}; batches, targets and weights are in {path}: "
        "torch.load(path, weights_only=False)",
    )


def _advice(trainer: SwitchKDTrainer) -> str:
    if broken := _broken(trainer):
        return f"the weights are not finite already, first {broken[0]}: {_slower(trainer)}"
    largest = max(float(weight.detach().abs().max()) for weight in trainer.vlm.parameters() if len(weight))
    if largest > _GROWN:
        return f"the weights have grown to {largest:.3g}: {_slower(trainer)}"
    half = trainer.args.bf16 or trainer.args.fp16
    return "look at these samples" + (", or --dtype float32" if half else f", or {_slower(trainer)}")


def _slower(trainer: SwitchKDTrainer) -> str:
    return f"lower --learning-rate (it is {trainer.args.learning_rate:g}), or raise --warmup"


def _broken(trainer: SwitchKDTrainer) -> list[str]:
    named = trainer.vlm.state_dict().items()
    return [name for name, weight in named if weight.is_floating_point() and not weight.isfinite().all()]
