"""A teacher's output head: what its logits are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from cachekd.cache.sketch import capped

ROWS = 8192  # of the weight at a time


@dataclass(frozen=True)
class OutputHead:
    """How a teacher's logits follow from its final hidden state: cap(weight . h + bias).

    Attributes:
        weight: [V, d] float, scaled by whatever the model scales its logits by; no padding rows.
        bias: [V] float, or None.
        softcap: see `TailSketch`.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 from [N, d]."""
        logits = hidden.to(self.weight) @ self.weight.T
        return capped((logits if self.bias is None else logits + self.bias).float(), self.softcap)

    def rows(self) -> Iterator[Tensor]:
        """The weight in float32, ROWS rows at a time: a whole copy of it is seldom at hand."""
        return (rows.float() for rows in self.weight.split(ROWS))
