"""What the losses ask of a teacher, whether it is live or cached."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from cachekd.losses.kneedle import leading_window


class TeacherTargets(Protocol):
    """The teacher's distribution at N answer tokens; logprobs are normalised over the whole vocabulary.

    `DenseTargets` serves a live teacher, `cachekd.cache.CachedTargets` a cache. The losses see only this.
    """

    @property
    def token_ids(self) -> Tensor:
        """[N] int64, the answer tokens themselves."""
        ...

    @property
    def vocab_size(self) -> int:
        """The ids that `gather` takes: 0 to vocab_size - 1."""
        ...

    @property
    def window(self) -> int:
        """Kneedle's window, for losses that do not set their own."""
        ...

    @property
    def min_k(self) -> int:
        """The least k, likewise."""
        ...

    def __len__(self) -> int:
        """Return the number N of answer tokens."""
        ...

    def leading(self, window: int, min_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Select the teacher's largest logits, for the teacher-led half of DBiLD.

        Args:
            window: Kneedle sees the `window` largest logits.
            min_k: the least k.

        Returns:
            ids [N, K] int64 and logprobs [N, K] float32 in descending order, and k [N] int64: row i holds
            k[i] valid entries; what follows them is padding (K = max k, on a GPU more).
        """
        ...

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Select the teacher's k most probable ids.

        Returns:
            ids [N, k] int64 and logprobs [N, k] float32, in descending order.
        """
        ...

    def gather(self, ids: Tensor) -> Tensor:
        """Return the teacher's logprobs [N, k] float32 at `ids` [N, k] int64; -inf at probability 0."""
        ...

    def everywhere(self) -> Tensor:
        """Return the teacher's logprobs [N, V] float32 at every id. Those of a cache need not be quite
        normalised. Ask for a few tokens at a time (`select`): nothing is kept."""
        ...

    def select(self, rows: Tensor) -> Self:
        """Select tokens by their indices [M] int64."""
        ...

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Copy to `device`."""
        ...


class DenseTargets:
    """A live teacher's logits.

    Args:
        logits: [N, V] float, unnormalised; no gradient is kept.
        token_ids: [N] int64, the answer tokens; the argmax of `logits` where they are not given.
    """

    window, min_k = 128, 2

    def __init__(self, logits: Tensor, token_ids: Tensor | None = None) -> None:
        logits = logits.detach()
        self.logprobs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        self.token_ids = logits.argmax(-1) if token_ids is None else token_ids

    @property
    def vocab_size(self) -> int:
        return self.logprobs.shape[-1]

    def __len__(self) -> int:
        return len(self.logprobs)

    def leading(self, window: int, min_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `TeacherTargets.leading`."""
        return leading_window(self.logprobs, window, min_k)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """See `TeacherTargets.topk`."""
        logprobs, ids = self.logprobs.topk(k, dim=-1)
        return ids, logprobs

    def gather(self, ids: Tensor) -> Tensor:
        """See `TeacherTargets.gather`."""
        return self.logprobs.gather(-1, ids)

    def everywhere(self) -> Tensor:
        """See `TeacherTargets.everywhere`."""
        return self.logprobs

    def select(self, rows: Tensor) -> DenseTargets:
        """See `TeacherTargets.select`."""
        return DenseTargets(self.logprobs[rows], self.token_ids[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DenseTargets:
        """See `TeacherTargets.to`."""
        moved = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.logprobs, self.token_ids))
        return DenseTargets(*moved)
