"""The visual switch: the student's visual features in the teacher's projector and language model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cachekd.vlm.load import load_without_tower
from cachekd.vlm.split import decode, project


class SwitchedTeacher:
    """P_T, L_T and the teacher's head: live, frozen, and outside any optimizer or checkpoint.

    Deliberately no `nn.Module`: set as an attribute of a trainer or a student it is not registered, so it
    has no parameters to optimise, to synchronise or to save.

    Args:
        model: the teacher; its parameters stop requiring gradients. Its vision encoder is not used.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str, *, dtype: torch.dtype, device: torch.device) -> SwitchedTeacher:
        """Load all but the vision encoder from a model folder or hub name."""
        return cls(load_without_tower(path, dtype=dtype, device=device))

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
            [N, V] logits. Their gradient reaches V_S and nothing else.
        """
        return decode(self.model, project(self.model, vision_output, inputs), inputs, positions)
