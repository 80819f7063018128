"""DBiLD: dynamic bidirectional logit differences, in O(k) instead of O(k^2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cachekd.errors import CachekdError
from cachekd.losses.basics import FLOOR, Reduction, full_precision, reduce, require_fit, require_temperature
from cachekd.losses.kneedle import leading_window

if TYPE_CHECKING:
    from cachekd.losses.targets import TeacherTargets


Direction = Literal["both", "teacher", "student"]

_MASKED = -1e30


def dbild_loss(
    student_logits: Tensor,
    targets: TeacherTargets,
    *,
    temperature: float = 3.0,
    window: int | None = None,
    min_k: int | None = None,
    direction: Direction = "both",
    reduction: Reduction = "mean",
) -> Tensor:
    """L_t + L_s (Switch-KD, equations 4-9): the teacher-led and the student-led half.

    In each half one side leads: Kneedle on the leading side's `window` largest logits chooses k per token,
    and the top-k ids of that side are compared on both sides. Only differences of logits count, so logprobs
    give the same result.

    Args:
        student_logits: [N, V] float, unnormalised; computed in float32 whatever the autocast.
        targets: the teacher at the same N tokens, live or cached, over the same V ids.
        temperature: tau, divides the differences.
        window: the most ids that Kneedle considers; by default the targets': a cache has the one that it was
            made with, and a live teacher 128.
        min_k: the least k; by default the targets' (2 of a live teacher), or `window` if that is less.
        direction: which halves to add up.
        reduction: "none" gives [N]; "mean" over no tokens is 0.

    Raises:
        CachekdError: shapes that do not match, or a setting out of range.
    """
    window = targets.window if window is None else window
    min_k = min(targets.min_k, window) if min_k is None else min_k
    require_fit(student_logits, targets)
    require_temperature(temperature)
    _check(window, min_k, direction)
    with torch.autocast(student_logits.device.type, enabled=False):
        logits = full_precision(student_logits)
        halves = []  # of each, the leader's ids, the teacher's logprobs there, and k
        if direction in ("both", "teacher"):
            halves.append(targets.leading(window, min_k))
        if direction in ("both", "student"):
            ids, _, k = leading_window(logits.detach(), window, min_k)
            halves.append((ids, targets.gather(ids), k))
        # One look-up for both: each has an array of the logits' size in its backward.
        own = logits.gather(-1, torch.cat([ids for ids, _, _ in halves], -1))
        parts = own.split([ids.shape[-1] for ids, _, _ in halves], -1)
        losses = [
            pairwise_reverse_kl(student, teacher.to(logits), k, temperature)
            for student, (_, teacher, k) in zip(parts, halves, strict=True)
        ]
    return reduce(torch.stack(losses).sum(0), reduction)


def pairwise_reverse_kl(student: Tensor, teacher: Tensor, k: Tensor, temperature: float) -> Tensor:
    """KL(p_S || p_T), p the softmax over all differences d_ij = (z_i - z_j) / tau with i < j < k.

    The k (k - 1) / 2 pairs are never formed. With a_i = exp(s_i / tau) and b_j = exp(-s_j / tau) the
    student's partition function is Z_S = sum_j b_j A_(j-1), A the cumulative sum of a. A pair has i on its
    left with probability row_i = a_i (sum of b_j over j > i) / Z_S, on its right with col_i = b_i A_(i-1) /
    Z_S. The log-ratio of a pair is e_i - e_j - log Z_S + log Z_T with e = (s - t) / tau, so

        KL = sum_i (row_i - col_i) e_i - log Z_S + log Z_T.

    All sums run in log space.

    Args:
        student: [N, K] float, in the leader's order.
        teacher: [N, K] float, at the same ids.
        k: [N] int64, valid entries per row; rows with fewer than two give 0.
        temperature: tau.

    Returns:
        [N], at least 0 up to rounding, differentiable in `student`.
    """
    valid = torch.arange(student.shape[-1], device=student.device) < k[:, None]
    s, t = (_centred(z, valid) / temperature for z in (student, teacher))
    log_col = _log_right_of_all(s, valid)
    log_z = log_col.logsumexp(-1, keepdim=True)
    row, col = (_log_left_of_all(s, valid) - log_z).exp(), (log_col - log_z).exp()
    log_z_teacher = _log_right_of_all(t, valid).logsumexp(-1)
    kl = ((row - col) * (s - t)).sum(-1) - log_z[:, 0] + log_z_teacher
    return torch.where(k >= 2, kl, 0.0)


def _centred(z: Tensor, valid: Tensor) -> Tensor:
    """Subtract the leader's first logit, for precision: only differences count. -inf becomes the floor."""
    z = z.masked_fill(~valid, 0.0)
    z = z - z[:, :1].detach().nan_to_num(neginf=0.0)
    return z.clamp(min=FLOOR).masked_fill(~valid, 0.0)


def _log_left_of_all(z: Tensor, valid: Tensor) -> Tensor:
    """log of a_i times the sum of b_j over j > i, [N, K]; summed over i it is the partition function."""
    log_b = (-z).masked_fill(~valid, _MASKED)
    after = log_b.flip(-1).logcumsumexp(-1).flip(-1)[:, 1:]
    return z.masked_fill(~valid, _MASKED) + F.pad(after, (0, 1), value=_MASKED)


def _log_right_of_all(z: Tensor, valid: Tensor) -> Tensor:
    """log of b_i times the sum of a_j over j < i, [N, K]; its sum is the same."""
    before = z.masked_fill(~valid, _MASKED).logcumsumexp(-1)[:, :-1]
    return (-z).masked_fill(~valid, _MASKED) + F.pad(before, (1, 0), value=_MASKED)


def _check(window: int, min_k: int, direction: str) -> None:
    if not 2 <= min_k <= window:
        raise CachekdError("min_k must be at least 2 and at most the window", found=f"{min_k=}, {window=}")
    if direction not in ("both", "teacher", "student"):
        raise CachekdError("unknown direction", expected="both, teacher or student", found=direction)
