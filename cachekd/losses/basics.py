"""What the losses share: logits that fit, distributions of them, and the reduction over answer tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from cachekd.errors import CachekdError

if TYPE_CHECKING:
    from cachekd.losses.targets import TeacherTargets

Reduction = Literal["mean", "sum", "none"]

# Stands for -inf where a number is needed: e**FLOOR is 0 at any temperature up to 1e3.
FLOOR = -1e5


def reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    """Reduce losses [N] of tokens: "none", "sum", or "mean" (0 over no tokens, where torch's is NaN)."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / max(1, len(loss))
    raise CachekdError("unknown reduction", expected="mean, sum or none", found=reduction)


def require_fit(logits: Tensor, targets: TeacherTargets) -> None:
    """Refuse logits of other tokens, or of another vocabulary.

    Raises:
        CachekdError: their shape is not [N, V].
    """
    if logits.shape != (len(targets), targets.vocab_size):
        raise CachekdError(
            "the student's logits do not match the teacher's targets",
            expected=f"[{len(targets)}, {targets.vocab_size}]: tokens, vocabulary",
            found=list(logits.shape),
            fix="slice a padded vocabulary: student_logits[:, : targets.vocab_size]",
        )


def require_temperature(temperature: float) -> None:
    """Refuse a temperature that nothing can be divided by.

    Raises:
        CachekdError: it is not above 0.
    """
    if not temperature > 0:
        raise CachekdError("the temperature must be positive", found=temperature)


def full_precision(logits: Tensor) -> Tensor:
    """Return float64 as it is, and anything else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def softened(logits: Tensor, targets: TeacherTargets, temperature: float) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logprobs [N, V] over the whole vocabulary, their logits divided by
    `temperature`."""
    require_fit(logits, targets)
    require_temperature(temperature)
    logits = full_precision(logits)
    teacher = targets.everywhere().to(logits)
    return (logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [N] from logprobs [N, C]; where p is 0 a term is 0, and q is kept from being exactly 0."""
    floor = torch.finfo(q.dtype).min / 4
    return torch.where(p > float("-inf"), p.exp() * (p.clamp(min=floor) - q.clamp(min=floor)), 0.0).sum(-1)


def teacher_topk(targets: TeacherTargets, k: int) -> tuple[Tensor, Tensor]:
    """The teacher's k most probable ids [N, k] and logprobs [N, k].

    Raises:
        CachekdError: there are fewer ids than that.
    """
    if not 1 <= k <= targets.vocab_size:
        raise CachekdError(
            "k is out of range", where="setting 'k' of a loss", expected=f"1 to {targets.vocab_size}", found=k
        )
    return targets.topk(k)
