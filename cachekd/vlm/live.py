"""A whole teacher, live: what a cache stands in for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cachekd.losses.targets import LiveTargets
from cachekd.vlm.split import logits_at
from cachekd.vlm.switch import SwitchedTeacher


@dataclass(frozen=True)
class LiveTeacher:
    """z_T = L_T(P_T(V_T(x_v)), x_t) at every step, from the model that also serves the switched path.

    Attributes:
        switch: the teacher, loaded with its vision encoder.
        vocab_size: tokens that the tokenizer can name; logits beyond them mean nothing.
        window, min_k: Kneedle's settings.
    """

    switch: SwitchedTeacher
    vocab_size: int
    window: int
    min_k: int

    @torch.no_grad()
    def targets(self, inputs: Mapping[str, Tensor], positions: Tensor, token_ids: Tensor) -> LiveTargets:
        """The teacher at N answer tokens; no gradient is kept.

        Args:
            inputs: the batch as the teacher's processor makes it.
            positions: [B, S] bool, the N places whose logits predict the answer tokens.
            token_ids: [N] int64, the answer tokens.
        """
        head = self.switch.head(inputs, positions)
        states = head.states(lambda: logits_at(self.switch.model, inputs, positions))
        return LiveTargets(token_ids, states, head.logits, self.vocab_size, self.window, self.min_k)
