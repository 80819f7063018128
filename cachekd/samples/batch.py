"""Samples as one forward of a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cachekd.samples.encode import Encoded, collate, predicting_positions


@dataclass(frozen=True)
class Batch:
    """B samples, padded to S tokens, on the model's device.

    Attributes:
        inputs: what the model's forward takes, by name.
        supervised: [B, S] bool, the N answer tokens.
    """

    inputs: dict[str, Tensor]
    supervised: Tensor

    @classmethod
    def of(cls, samples: Sequence[Encoded], pad_token_id: int, device: torch.device) -> Batch:
        """See `collate`."""
        inputs = {name: value.to(device) for name, value in collate(samples, pad_token_id).items()}
        return cls(inputs, inputs.pop("supervised"))

    @property
    def positions(self) -> Tensor:
        """[B, S] bool, the N places whose logits predict the answer tokens."""
        return predicting_positions(self.supervised)

    @property
    def token_ids(self) -> Tensor:
        """[N] int64, the answer tokens."""
        return self.inputs["input_ids"][self.supervised]

    @property
    def counts(self) -> list[int]:
        """How many answer tokens each sample has."""
        return self.supervised.sum(1).tolist()
