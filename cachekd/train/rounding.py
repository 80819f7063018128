"""Weights in bfloat16 that learn: an optimizer's step in float32, rounded at random.

A bfloat16 has eight bits, so a step below some 1/500 of a weight is lost where it is rounded to the nearest,
and at fine-tuning's learning rates most are. Rounded up or down at random, by how near each is, the weight is
right on average. Nothing else has to be kept: the moments are in float32, or in the eight bits of an
optimizer that has such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError

# The Trainer's names of optimizers that may take a step parameter by parameter: none looks at the others, and
# what is kept of each is made in its first step (Adagrad's is made before, in the parameter's dtype).
BY_PARAMETER = frozenset(
    {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"}
    | {"adamw_torch_8bit", "adamw_torch_4bit"}  # torchao's
    | {"adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"}  # bitsandbytes'
    | {"lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"}
)


def check_rounding(config: TrainConfig, arguments: TrainingArguments) -> None:
    """Refuse what a student in bfloat16 cannot train with.

    Raises:
        CachekdError: its forward is in another dtype; its optimizer cannot go parameter by parameter; or its
            weights are sharded.
    """
    if not arguments.bf16:
        raise CachekdError(
            "a student in bfloat16 computes in bfloat16",
            where="settings 'student_dtype' and 'dtype'",
            expected="dtype bfloat16, which is the default on a GPU alone",
            found=config.dtype,
            fix="--dtype bfloat16, or leave --student-dtype out",
        )
    lora = config.lora or {}
    weights_too = config.lora is None or lora.get("modules_to_save") or lora.get("bias", "none") != "none"
    if weights_too and (name := OptimizerNames(arguments.optim).value) not in BY_PARAMETER:
        raise CachekdError(
            "this optimizer cannot step one parameter at a time, as weights in bfloat16 need it",
            where="settings 'student_dtype' and 'training.optim'",
            expected=f"one of {', '.join(sorted(BY_PARAMETER))}",
            found=name,
            fix="choose one of these, or leave --student-dtype out",
        )
    if arguments.fsdp or arguments.deepspeed:
        raise CachekdError(
            "sharded weights are not rounded at random here",
            where="settings 'student_dtype' and 'training'",
            expected="neither fsdp nor deepspeed",
            fix="leave --student-dtype out: both have mixed precision of their own",
        )


def round_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round to one of the two nearest bfloat16, to each with the chance that makes the mean exact.

    Args:
        values: float32, of any shape.
        generator: on their device.

    Returns:
        bfloat16, of the same shape; what is not finite stays as it is.
    """
    bits = values.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)  # of the bits that are cut off
    rounded = noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def rounds_at_random(optimizer: torch.optim.Optimizer, seed: int, step: Callable[[], int]) -> None:
    """Have an optimizer's steps of bfloat16 parameters taken in float32, in place; of others as they were.
    Where there are none, or that is so already, nothing is changed.

    The noise follows from `seed` and the number of the step alone: it is the same in a run that is gone on
    with, and in every process of several.

    Args:
        optimizer: of `BY_PARAMETER`. One parameter at a time is in float32, with its gradient.
        step: the number of the step that is taken.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kind = type(optimizer)
    if issubclass(kind, _RoundsAtRandom) or all(p.dtype != torch.bfloat16 for p in parameters):
        return
    optimizer.__class__ = type(kind.__name__, (_RoundsAtRandom, kind), {"noise": (seed, step)})
    eight_bit: Any = optimizer
    if hasattr(eight_bit, "check_overrides"):
        # bitsandbytes notes in the first step which weights are to have other moments, by their places in a
        # group, and steps below have one weight in it: so it notes now, and finds them by the weights.
        eight_bit.check_overrides()
        eight_bit.mng.index2config.clear()
        eight_bit.initialized = True


class _RoundsAtRandom(torch.optim.Optimizer):
    noise: tuple[int, Callable[[], int]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """The optimizer's own, parameter by parameter where these are in bfloat16."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seed, step = self.noise
        generators = _Generators(f"{seed} {step()}")
        groups = [(group, group["params"]) for group in self.param_groups]
        try:
            for group, _ in groups:
                group["params"] = []
            for group, parameters in groups:
                group["params"] = [p for p in parameters if p.dtype != torch.bfloat16]
                if group["params"]:
                    super().step()
                for parameter in parameters:
                    if parameter.dtype == torch.bfloat16 and parameter.grad is not None:
                        group["params"] = [parameter]
                        with _in_float32(parameter, generators):
                            super().step()
                group["params"] = []
        finally:
            for group, parameters in groups:
                group["params"] = parameters
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        """The optimizer's own, which would round the moments to the parameters' dtype."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.dtype == torch.bfloat16]
        weights = [(parameter, parameter.data) for parameter in parameters]
        try:
            for parameter, weight in weights:  # of no size, as nothing is read of it
                parameter.data = torch.zeros((), device=weight.device).expand(weight.shape)
            super().load_state_dict(state_dict)
        finally:
            for parameter, weight in weights:
                parameter.data = weight


class _Generators(dict[torch.device, torch.Generator]):
    """One of each device, all begun alike."""

    def __init__(self, name: str) -> None:
        self._seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])

    def __missing__(self, device: torch.device) -> torch.Generator:
        self[device] = torch.Generator(device).manual_seed(self._seed)
        return self[device]


@contextmanager
def _in_float32(parameter: nn.Parameter, generators: _Generators) -> Iterator[None]:
    """A parameter and its gradient; after the block the parameter is rounded at random."""
    weight, gradient = parameter.data, parameter.grad
    assert gradient is not None
    parameter.grad = None  # which has to have the parameter's dtype
    parameter.data = weight.float()
    parameter.grad = gradient.float()
    try:
        yield
        weight.copy_(round_at_random(parameter.data, generators[weight.device]))
    finally:
        parameter.grad = None
        parameter.data = weight
        parameter.grad = gradient
