"""What the losses ask of a teacher, whether it is live or cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class TeacherTargets(Protocol):
    """The teacher's distribution at N answer tokens; logprobs are normalised over the whole vocabulary.

    `DenseTargets` serves a live teacher, `cachekd.cache.CachedTargets` a cache. The losses see only this.
    """

    token_ids: Tensor  # [N] int64, the answer tokens themselves
    vocab_size: int

    def __len__(self) -> int:
        """The number N of answer tokens."""
        ...

    def leading(self, window: int, min_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's own selection for the teacher-led half of DBiLD.

        Args:
            window: Kneedle looks at the `window` largest logits.
            min_k: the least k.

        Returns:
            ids [N, K] int64 and logprobs [N, K] float32 in descending order, and k [N] int64: row i holds
            k[i] valid entries and padding after them (K = max k; padded ids are 0).
        """
        ...

    def gather(self, ids: Tensor) -> Tensor:
        """The teacher's logprobs [N, k] float32 at `ids` [N, k] int64."""
        ...

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """A copy on `device`."""
        ...


@dataclass(frozen=True)
class DenseTargets:
    """A live teacher's logits.

    Args:
        logits: [N, V] float, unnormalised; no gradient is kept.
        token_ids: [N] int64, the answer tokens; the argmax of `logits` where they are not given.
    """

    logits: Tensor
    token_ids: Tensor = None  # type: ignore[assignment]  # set in __post_init__

    def __post_init__(self) -> None:
        logits = self.logits.detach().float()
        object.__setattr__(self, "logits", logits)
        object.__setattr__(self, "_logprobs", logits.log_softmax(-1))
        if self.token_ids is None:
            object.__setattr__(self, "token_ids", logits.argmax(-1))

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[-1]

    def __len__(self) -> int:
        return self.logits.shape[0]
