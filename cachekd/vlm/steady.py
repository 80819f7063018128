"""Normalisation that does not depend on the batch."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_statistics(model: nn.Module) -> None:
    """Let batch norms (FastVLM's encoder has them) use the checkpoint's statistics in training too.

    Else a sample's features would depend on its neighbours in the batch, the gradient on how a step is
    accumulated, and what is saved would give other features than what was trained.
    """

    def settle(module: nn.Module, _args: Any) -> None:
        module.training = False

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(settle)
