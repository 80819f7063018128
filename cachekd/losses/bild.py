"""BiLD (arXiv 2406.13555), DBiLD's ancestor: a fixed k, forward KL, and all pairs formed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cachekd.losses.basics import (
    FLOOR,
    Reduction,
    full_precision,
    kl,
    reduce,
    require_fit,
    require_temperature,
    teacher_topk,
)

if TYPE_CHECKING:
    from cachekd.losses.targets import TeacherTargets


def bild_loss(
    student_logits: Tensor,
    targets: TeacherTargets,
    *,
    k: int = 8,
    temperature: float = 3.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Forward KL over the pairwise differences of k logits; both sides lead, as in `dbild_loss`.

    Args:
        student_logits: [N, V] float, unnormalised.
        targets: the teacher at the same N tokens.
        k: at least 2, at most V. The pairs are formed, so memory is O(N k^2).
        temperature: divides the differences.

    Raises:
        CachekdError: shapes that do not match, or a setting out of range.
    """
    require_fit(student_logits, targets)
    require_temperature(temperature)
    logits = full_precision(student_logits)
    teacher_ids, teacher_led = teacher_topk(targets, k)
    student_led, student_ids = logits.topk(k, dim=-1)
    loss = _pair_kl(teacher_led.to(logits), logits.gather(-1, teacher_ids), temperature)
    loss = loss + _pair_kl(targets.gather(student_ids).to(logits), student_led, temperature)
    return reduce(loss, reduction)


def _pair_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    left, right = torch.triu_indices(teacher.shape[-1], teacher.shape[-1], 1, device=teacher.device)
    finite = [z.clamp(min=FLOOR) for z in (teacher, student)]
    pairs = [((z[:, left] - z[:, right]) / temperature).log_softmax(-1) for z in finite]
    return kl(*pairs)
