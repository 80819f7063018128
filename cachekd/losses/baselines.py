"""The losses that DBiLD is compared with: same targets, same reduction, float32 whatever the autocast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cachekd.errors import CachekdError
from cachekd.losses.dbild import FLOOR, Reduction, reduce, require_fit

if TYPE_CHECKING:
    from cachekd.losses.targets import TeacherTargets


def cross_entropy_loss(student_logits: Tensor, token_ids: Tensor, reduction: Reduction = "mean") -> Tensor:
    """L_CE: -log p_S(answer token).

    Args:
        student_logits: [N, V] float, unnormalised.
        token_ids: [N] int64.
    """
    return reduce(F.cross_entropy(_full_precision(student_logits), token_ids, reduction="none"), reduction)


def forward_kl_loss(
    student_logits: Tensor,
    targets: TeacherTargets,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(p_T || p_S) over the whole vocabulary, both softened by `temperature` (Hinton et al. 2015).

    Args:
        student_logits: [N, V] float, unnormalised.
        targets: the teacher at the same N tokens.
    """
    student, teacher = _softened(student_logits, targets, temperature)
    return reduce(_kl(teacher, student), reduction)


def reverse_kl_loss(
    student_logits: Tensor,
    targets: TeacherTargets,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(p_S || p_T) over the whole vocabulary, both softened by `temperature` (MiniLLM, arXiv 2306.08543).

    Args:
        student_logits: [N, V] float, unnormalised.
        targets: the teacher at the same N tokens.
    """
    student, teacher = _softened(student_logits, targets, temperature)
    return reduce(_kl(student, teacher), reduction)


def topk_kl_loss(
    student_logits: Tensor, targets: TeacherTargets, *, k: int = 64, reduction: Reduction = "mean"
) -> Tensor:
    """KL(p_T || p_S) over the teacher's k most probable ids and one bucket for all the others.

    The bucket makes both sides distributions: without it the sum can be negative.

    Args:
        student_logits: [N, V] float, unnormalised.
        targets: the teacher at the same N tokens.
        k: at most V.
    """
    require_fit(student_logits, targets)
    logprobs = _full_precision(student_logits).log_softmax(-1)
    ids, teacher = _teacher_topk(targets, k)
    student = logprobs.gather(-1, ids)
    rest = [_log1mexp(x.logsumexp(-1, keepdim=True)) for x in (teacher, student)]
    return reduce(_kl(torch.cat([teacher, rest[0]], -1), torch.cat([student, rest[1]], -1)), reduction)


def bild_loss(
    student_logits: Tensor,
    targets: TeacherTargets,
    *,
    k: int = 8,
    temperature: float = 3.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """BiLD (arXiv 2406.13555): fixed k, forward KL over the pairwise differences, both directions.

    Args:
        student_logits: [N, V] float, unnormalised.
        targets: the teacher at the same N tokens.
        k: at least 2, at most V. The pairs are formed, so memory is O(N k^2).
        temperature: divides the differences.
    """
    require_fit(student_logits, targets)
    logits = _full_precision(student_logits)
    teacher_ids, teacher_led = _teacher_topk(targets, k)
    student_led, student_ids = logits.topk(k, dim=-1)
    loss = _pair_kl(teacher_led.to(logits), logits.gather(-1, teacher_ids), temperature)
    loss = loss + _pair_kl(targets.gather(student_ids).to(logits), student_led, temperature)
    return reduce(loss, reduction)


def _pair_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    left, right = torch.triu_indices(teacher.shape[-1], teacher.shape[-1], 1, device=teacher.device)
    finite = [z.clamp(min=FLOOR) for z in (teacher, student)]
    pairs = [((z[:, left] - z[:, right]) / temperature).log_softmax(-1) for z in finite]
    return _kl(*pairs)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [N] from logprobs [N, C]; where p is 0 a term is 0, and q is kept from being exactly 0."""
    floor = torch.finfo(q.dtype).min / 4
    return torch.where(p > float("-inf"), p.exp() * (p.clamp(min=floor) - q.clamp(min=floor)), 0.0).sum(-1)


def _softened(logits: Tensor, targets: TeacherTargets, temperature: float) -> tuple[Tensor, Tensor]:
    require_fit(logits, targets)
    logits = _full_precision(logits)
    everything = torch.arange(targets.vocab_size, device=logits.device).expand(len(targets), -1)
    teacher = targets.gather(everything).to(logits)
    return (logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def _teacher_topk(targets: TeacherTargets, k: int) -> tuple[Tensor, Tensor]:
    """The teacher's k most probable ids [N, k] and logprobs [N, k], whether or not a cache holds them all."""
    if not 1 <= k <= targets.vocab_size:
        raise CachekdError("k is out of range", expected=f"1 to {targets.vocab_size}", found=k)
    everything = torch.arange(targets.vocab_size, device=targets.token_ids.device).expand(len(targets), -1)
    logprobs, ids = targets.gather(everything).topk(k, dim=-1)
    return ids, logprobs


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e**x) for x <= 0; a sum that rounds to 1 or above leaves the smallest remainder there is."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.log(-torch.expm1(x))


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
