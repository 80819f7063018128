"""Squared differences of centred logits over the whole vocabulary (Ba and Caruana, arXiv 1312.6184)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cachekd.losses.basics import Reduction, full_precision, reduce, require_fit

if TYPE_CHECKING:
    from cachekd.losses.targets import TeacherTargets


def mse_loss(student_logits: Tensor, targets: TeacherTargets, *, reduction: Reduction = "mean") -> Tensor:
    """The mean over the vocabulary of (z_S - z_T)^2, each side's mean subtracted first.

    A teacher's logprobs and logits differ only by a constant for each token, so they are equal once centred.
    Ids to which either side gives probability 0 (-inf) are left out of the means.

    Args:
        student_logits: [N, V] float, unnormalised.
        targets: the teacher at the same N tokens.

    Raises:
        CachekdError: shapes that do not match.
    """
    require_fit(student_logits, targets)
    logits = full_precision(student_logits)
    teacher = targets.everywhere().to(logits)
    finite = logits.isfinite() & teacher.isfinite()
    count = finite.sum(-1).clamp(min=1)
    # Of two whose means are subtracted, the difference is that of the two with its own mean subtracted.
    difference = logits.masked_fill(~finite, 0.0) - teacher.masked_fill(~finite, 0.0)
    mean = difference.sum(-1, keepdim=True) / count[:, None]
    return reduce(((difference - mean).masked_fill(~finite, 0.0) ** 2).sum(-1) / count, reduction)
