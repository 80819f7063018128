"""How many of the largest logits matter: the knee of the sorted curve."""

from __future__ import annotations

import torch
from torch import Tensor

from cachekd.errors import CachekdError


def kneedle_k(sorted_logits: Tensor) -> Tensor:
    """Find the knee of each row: where the sorted curve lies farthest below its chord (Switch-KD, Figure 2).

    Both axes are normalised to [0, 1] over the row's finite prefix. The knee is argmax_i (1 - x_i) - y_i, and
    the first such index if there are several. A curve that is nowhere below its chord (flat, or concave) has
    its knee at the first entry.

    Args:
        sorted_logits: [N, C] float, descending; -inf entries at the end do not count.

    Returns:
        [N] int64: entries from the largest up to and including the knee, so at least 1; 0 where no entry is
        finite.

    Raises:
        CachekdError: it has another shape, or no column.
    """
    if sorted_logits.ndim != 2 or not sorted_logits.shape[1]:
        raise CachekdError(
            "Kneedle takes rows of logits", expected="[N, C], C at least 1", found=list(sorted_logits.shape)
        )
    values = sorted_logits.detach().float()
    finite = values.isfinite()
    count = finite.sum(-1, keepdim=True)  # [N, 1]
    index = torch.arange(values.shape[-1], device=values.device)
    x = index / (count - 1).clamp(min=1)
    low = values.gather(-1, (count - 1).clamp(min=0))
    span = values[:, :1] - low
    # Positive scores only below the chord; a flat curve has no span and scores 0 at its first entry.
    y = torch.where(span > 0, (values - low) / span, 1 - x)
    score = (1 - x - y).masked_fill(~finite, float("-inf"))
    return torch.where(count[:, 0] > 0, score.argmax(-1) + 1, 0)


def leading_window(logits: Tensor, window: int, min_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Select a model's largest logits, up to the knee.

    Args:
        logits: [N, V] float.
        window: Kneedle sees the `window` largest.
        min_k: the least k, where that many logits are finite.

    Returns:
        ids [N, K] int64 in descending order of their logits, the logits there [N, K], and k [N] int64. Row i
        has k[i] valid entries; what follows them is padding (K = max k, on a GPU `window`).
    """
    values, ids = logits.topk(min(window, logits.shape[-1]), dim=-1)
    finite = values.isfinite().sum(-1)
    k = torch.minimum(kneedle_k(values).clamp(min=min_k), finite)
    width = widest(k, ids.shape[1])
    return ids[:, :width], values[:, :width], k


def widest(k: Tensor, width: int) -> int:
    """Count the columns of `width` that hold every row's first `k` [N] int64 entries; at least one.

    Fewer than `width` where that is known for nothing: a look at a number on a GPU waits until everything
    before it has run, which costs more there than the columns do.
    """
    if k.device.type != "cpu":
        return width
    return max(1, int(k.max())) if len(k) else 1
