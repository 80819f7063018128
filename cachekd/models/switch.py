"""The student's vision in the teacher: the switched path; and the whole teacher, live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cachekd.losses.chunked import LiveTargets
from cachekd.models.head import DeferredHead
from cachekd.models.split import decode, logits_at, project


class SwitchedTeacher:
    """P_T, L_T and the teacher's head: live, frozen, and outside any optimizer or checkpoint.

    This is deliberately no `nn.Module`. As an attribute of a trainer or a student it is not registered there,
    so it has no parameters to optimise, to synchronise or to save.

    Args:
        model: the teacher; its parameters stop requiring gradients. Its vision encoder is not used, and need
            not have been loaded (`ModelFiles.load`), but by a `LiveTeacher`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self._head: DeferredHead | None = None

    def head(self, inputs: Mapping[str, Tensor], positions: Tensor) -> DeferredHead:
        """The teacher's head, measured on the first batch that asks for it."""
        if self._head is None:
            self._head = DeferredHead(self.model, inputs, positions)
        return self._head

    def to(self, device: torch.device) -> SwitchedTeacher:
        """Move the teacher's modules, in place."""
        self.model.to(device)
        return self

    def logits(self, vision_output: ModelOutput, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """z_W = L_T(P_T(V_S(x_v)), x_t), the switched path.

        Args:
            vision_output: V_S's raw output, from `capture_vision` during the student's own forward.
            inputs: the batch.
            positions: [B, S] bool, where logits are wanted.

        Returns:
            [N, V] logits, where the teacher's head is. Their gradient reaches V_S and nothing else.
        """
        return decode(self.model, project(self.model, vision_output, inputs), inputs, positions)


@dataclass(frozen=True)
class LiveTeacher:
    """z_T = L_T(P_T(V_T(x_v)), x_t) at every step, from the model that also serves the switched path.

    Attributes:
        switch: the teacher, loaded with its vision encoder.
        vocab_size: tokens that the tokenizer can name; logits beyond them mean nothing.
    """

    switch: SwitchedTeacher
    vocab_size: int

    @torch.no_grad()
    def targets(self, inputs: Mapping[str, Tensor], positions: Tensor, token_ids: Tensor) -> LiveTargets:
        """The teacher at N answer tokens; no gradient is kept.

        Args:
            inputs: the batch as the teacher's processor makes it.
            positions: [B, S] bool, the N places whose logits predict the answer tokens.
            token_ids: [N] int64, the answer tokens.
        """
        head = self.switch.head(inputs, positions)
        states = head.states(lambda: logits_at(self.switch.model, inputs, positions)).to(positions.device)
        return LiveTargets(token_ids, states, head.logits, self.vocab_size)
