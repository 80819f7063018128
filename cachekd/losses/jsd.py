"""The generalised Jensen-Shannon divergence over the whole vocabulary (GKD, arXiv 2306.13649, equation 1)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cachekd.errors import CachekdError
from cachekd.losses.basics import Reduction, kl, reduce, softened

if TYPE_CHECKING:
    from cachekd.losses.targets import TeacherTargets


def jsd_loss(
    student_logits: Tensor,
    targets: TeacherTargets,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """beta KL(p_T || m) + (1 - beta) KL(p_S || m) with m = beta p_T + (1 - beta) p_S.

    Divided by beta it tends to forward KL as beta tends to 0; divided by 1 - beta, to reverse KL as beta
    tends to 1.

    Args:
        student_logits: [N, V] float, unnormalised.
        targets: the teacher at the same N tokens.
        beta: the teacher's share of m, between 0 and 1.
        temperature: softens both.

    Raises:
        CachekdError: shapes that do not match, or a setting out of range.
    """
    if not 0 < beta < 1:
        raise CachekdError("beta is out of range", expected="above 0 and below 1", found=beta)
    student, teacher = softened(student_logits, targets, temperature)
    floor = torch.finfo(student.dtype).min / 4  # of two -inf the gradient would be NaN
    mixture = torch.logaddexp(
        teacher.clamp(min=floor) + math.log(beta), student.clamp(min=floor) + math.log1p(-beta)
    )
    return reduce(beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture), reduction)
