"""What does not depend on the batch: normalisation, and a model that is looked at while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode; afterwards each of its modules is in its own again: some differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
