"""L_CE: the answer itself, for which no teacher is asked."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cachekd.losses.basics import Reduction, full_precision, reduce


def cross_entropy_loss(student_logits: Tensor, token_ids: Tensor, reduction: Reduction = "mean") -> Tensor:
    """-log p_S(answer token), in float32 whatever the autocast.

    Args:
        student_logits: [N, V] float, unnormalised.
        token_ids: [N] int64.
    """
    return reduce(F.cross_entropy(full_precision(student_logits), token_ids, reduction="none"), reduction)
