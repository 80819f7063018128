"""The one reduction that every loss here shares."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from cachekd.errors import CachekdError

Reduction = Literal["mean", "sum", "none"]


def reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    """[N] per token to "none": itself, "sum", or "mean" (0 over no tokens, where torch's would be NaN)."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / max(1, len(loss))
    raise CachekdError("unknown reduction", expected="mean, sum or none", found=reduction)
