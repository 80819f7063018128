"""A card that is too small: what a model does where memory runs out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from cachekd.models import load_model


@dataclass
class Card:
    """How many padded tokens and samples it has room for, and the shapes of the batches that it was given."""

    tokens: int | None = None
    samples: int | None = None
    batches: list[tuple[int, int]] = field(default_factory=list)

    def load(self, path: str, **settings: Any) -> Any:
        """Load a model whose forwards are on this card."""
        model = load_model(path, **settings)
        model.register_forward_pre_hook(self._forward, with_kwargs=True)
        return model

    def _forward(self, _module: Any, _args: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.batches.append(tuple(inputs["input_ids"].shape))
        samples, longest = self.batches[-1]
        if samples * longest > (self.tokens or samples * longest) or samples > (self.samples or samples):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
