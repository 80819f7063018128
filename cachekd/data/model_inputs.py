"""Samples as one forward of a model takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cachekd.data.encode import predicting_positions


@dataclass(frozen=True)
class ModelInputs:
    """What one model reads of a batch of B samples.

    Attributes:
        tensors: by the names of the model's forward: `input_ids` [B, S] int64, images as the model has them.
        supervised: [B, S] bool, true on the N answer tokens.
    """

    tensors: dict[str, Tensor]
    supervised: Tensor

    @classmethod
    def of(cls, collated: dict[str, Tensor]) -> ModelInputs:
        """Of what `collate` returns."""
        return cls({name: x for name, x in collated.items() if name != "supervised"}, collated["supervised"])

    @property
    def positions(self) -> Tensor:
        """[B, S] bool, the places whose logits predict the answer tokens."""
        return predicting_positions(self.supervised)

    @property
    def token_ids(self) -> Tensor:
        """[N] int64, the answer tokens."""
        return self.tensors["input_ids"][self.supervised]

    @property
    def counts(self) -> list[int]:
        """How many answer tokens each sample has."""
        return self.supervised.sum(1).tolist()

    def moved(self, move: Callable[[Tensor], Tensor]) -> ModelInputs:
        """Each tensor as `move` returns it."""
        return ModelInputs({name: move(x) for name, x in self.tensors.items()}, move(self.supervised))

    def to(self, device: torch.device) -> ModelInputs:
        """On another device."""
        return self.moved(lambda x: x.to(device))
