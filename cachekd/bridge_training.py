"""How a switch bridge trains beside the student: in its optimizer, under its gradient clip, no part of it."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from cachekd.errors import CachekdError
from cachekd.vlm import SwitchBridge


def no_sharding() -> CachekdError:
    """What to say under FSDP or DeepSpeed."""
    return CachekdError(
        "the switch bridge cannot be trained under FSDP or DeepSpeed: they train the student alone",
        where="setting 'switch_bridge'",
        fix="train with DDP (accelerate launch --multi_gpu), or leave --switch-bridge out",
    )


def add_to_optimizer(optimizer: Optimizer, bridge: SwitchBridge, weight_decay: float) -> None:
    """As the Trainer does with the student's layers: a bias has no weight decay."""
    optimizer.add_param_group({"params": [bridge.linear.weight], "weight_decay": weight_decay})
    optimizer.add_param_group({"params": [bridge.linear.bias], "weight_decay": 0.0})


def mean_gradients(bridge: SwitchBridge, accelerator: Accelerator) -> None:
    """Over all processes. Not by DDP: it would wait for a process whose batch has no image."""
    for parameter in bridge.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(gradient, reduction="mean")
