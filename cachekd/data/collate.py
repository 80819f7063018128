"""Encoded samples become one batch, as a forward of a model takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from cachekd.data.encode import PER_TOKEN, Encoded


def collate(
    samples: Sequence[Encoded], pad_token_id: int, padding_side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """Pad samples into one batch; on the left what is to be continued.

    Image tensors of all samples that have some are concatenated in order, after padding with zeros to one
    size where they differ: families whose images have tiles or sizes of their own know from their other
    inputs (sizes, masks, all-zero images) what is padding.

    Returns:
        `input_ids` [B, S] int64, `attention_mask` [B, S] int64, `supervised` [B, S] bool, the image tensors.
    """
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample.inputs):
        values = [sample.inputs[name] for sample in samples if name in sample.inputs]
        if name in PER_TOKEN:
            padding = pad_token_id if name == "input_ids" else 0
            batch[name] = pad_sequence(
                values, batch_first=True, padding_value=padding, padding_side=padding_side
            )
        else:
            batch[name] = torch.cat(_same_size(values))
    lengths = [torch.ones(len(sample), dtype=torch.long) for sample in samples]
    batch["attention_mask"] = pad_sequence(lengths, batch_first=True, padding_side=padding_side)
    supervised = [sample.supervised for sample in samples]
    batch["supervised"] = pad_sequence(supervised, batch_first=True, padding_side=padding_side)
    return batch


def _same_size(values: Sequence[Tensor]) -> list[Tensor]:
    """Zeros behind each axis but the first, up to the longest."""
    longest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [most - size for size, most in zip(value.shape[1:], longest, strict=True)]
        both_ends = [amount for gap in reversed(missing) for amount in (0, gap)]
        padded.append(pad(value, both_ends) if any(missing) else value)
    return padded


def predicting_positions(supervised: Tensor) -> Tensor:
    """[B, S] bool: the positions whose logits predict the supervised tokens (one to their left)."""
    return torch.cat([supervised[:, 1:], torch.zeros_like(supervised[:, :1])], dim=1)


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
        """Take apart what `collate` returns."""
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

    def with_pictures_of(self, other: ModelInputs) -> ModelInputs:
        """Give the text the pictures of other inputs of the same samples: as many, with as many places."""
        ours = {name: x for name, x in self.tensors.items() if name in PER_TOKEN}
        theirs = {name: x for name, x in other.tensors.items() if name not in PER_TOKEN}
        return ModelInputs(ours | theirs, self.supervised)

    def moved(self, move: Callable[[Tensor], Tensor]) -> ModelInputs:
        """Each tensor as `move` returns it."""
        return ModelInputs({name: move(x) for name, x in self.tensors.items()}, move(self.supervised))

    def to(self, device: torch.device) -> ModelInputs:
        """Move it to another device."""
        return self.moved(lambda x: x.to(device))
