"""Forward KL over the teacher's most probable ids, and one bucket for all the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cachekd.losses.basics import (
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


def topk_kl_loss(
    student_logits: Tensor,
    targets: TeacherTargets,
    *,
    k: int = 64,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(p_T || p_S) over the teacher's k most probable ids and one bucket for all the others.

    The bucket makes both sides distributions; without it the sum can be negative. The temperature softens the
    k ids and the bucket, because a cache of k logprobs knows no more. The loss is not multiplied by its
    square.

    Args:
        student_logits: [N, V] float, unnormalised.
        targets: the teacher at the same N tokens.
        k: at most V.
        temperature: divides the k + 1 logprobs of both, which are then normalised again.

    Raises:
        CachekdError: shapes that do not match, or a setting out of range.
    """
    require_fit(student_logits, targets)
    require_temperature(temperature)
    logprobs = full_precision(student_logits).log_softmax(-1)
    ids, teacher = teacher_topk(targets, k)
    sides = (_with_bucket(side, temperature) for side in (teacher.to(logprobs), logprobs.gather(-1, ids)))
    return reduce(kl(*sides), reduction)


def _with_bucket(logprobs: Tensor, temperature: float) -> Tensor:
    """[N, k] to [N, k + 1]; at a temperature of 1 as they are, normalised already."""
    rest = _log1mexp(logprobs.logsumexp(-1, keepdim=True))
    joined = torch.cat([logprobs, rest], -1)
    return joined if temperature == 1 else (joined / temperature).log_softmax(-1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e**x) for x <= 0; a sum that rounds to 1 or above leaves the smallest remainder there is."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.log(-torch.expm1(x))
