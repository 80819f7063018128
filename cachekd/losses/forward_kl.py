"""Forward KL over the whole vocabulary (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cachekd.losses.basics import Reduction, kl, reduce, softened

if TYPE_CHECKING:
    from cachekd.losses.targets import TeacherTargets


def forward_kl_loss(
    student_logits: Tensor,
    targets: TeacherTargets,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(p_T || p_S), both softened by `temperature`; not multiplied by its square.

    Args:
        student_logits: [N, V] float, unnormalised.
        targets: the teacher at the same N tokens.
    """
    student, teacher = softened(student_logits, targets, temperature)
    return reduce(kl(teacher, student), reduction)
