"""What a VLM family is, to the split."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.utils import ModelOutput

# Inputs that only the vision encoder reads: the language model's forward must not see them again. Grids,
# image sizes and token types stay: positions and attention masks follow from them.
PIXEL_INPUTS = ("pixel_values", "pixel_attention_mask")

Replay = Callable[[nn.Module, ModelOutput], nn.Module]


def stand_in(tower: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A shallow copy of a vision encoder with another forward and no hooks; the encoder is not changed.

    Its configuration and attributes (patch size, merge size) stay: the family's own code reads them.
    """
    twin = copy.copy(tower)
    twin.__dict__ |= {"forward": forward, "_forward_hooks": {}, "_forward_pre_hooks": {}}
    return twin


def changed(output: ModelOutput, **fields: Any) -> ModelOutput:
    """A shallow copy of an encoder's output with other fields."""
    copied = copy.copy(output)
    for name, value in fields.items():
        copied[name] = value
    return copied


def replay_output(tower: nn.Module, output: ModelOutput) -> nn.Module:
    """A vision encoder that returns an output that is already there."""
    return stand_in(tower, lambda *_args, **_kwargs: copy.copy(output))


@dataclass(frozen=True)
class Family:
    """The facts of one family; everything else in `cachekd.vlm` is shared.

    Attributes:
        model_type: as `config.json` has it.
        tower: the attribute of the inner model (`model.model`) that holds the vision encoder; None without
            one.
        inside: attributes of the vision encoder that belong to the projector (Qwen's mergers).
        taps: which of them are lists of modules whose inputs are part of V's output (Qwen3-VL's deepstack).
        replay: from a projector's encoder (which may have lost its weights) and V's output to the module
            that stands for the encoder in the family's own `get_image_features`.
        width: the attribute of `config.vision_config` that is the width of V's output.
        shared: attributes of the config (dotted) that teacher and student must have in common for the
            switch: what lies between V and P, and which inputs both read.
        equally_many: such attributes that need only be equally long.
    """

    model_type: str
    tower: str | None = "vision_tower"
    inside: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    replay: Replay = replay_output
    width: str = "hidden_size"
    shared: tuple[str, ...] = ()
    equally_many: tuple[str, ...] = ()
