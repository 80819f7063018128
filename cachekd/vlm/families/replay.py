"""A vision encoder that is there already: what a family's own `get_image_features` is run around."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput
from transformers.vision_utils import get_vision_window_index

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


def merge_output(tower: Any, output: ModelOutput) -> nn.Module:
    """An encoder that runs its own merger on the patches [P, d] of `output`."""

    def forward(_pixels: Tensor, **_kwargs: Any) -> ModelOutput:
        return changed(output, pooler_output=tower.merger(output.last_hidden_state))

    return stand_in(tower, forward)


def merge_windows(tower: Any, output: ModelOutput) -> nn.Module:
    """An encoder that runs its own merger on patches in window order and puts the result in image order."""

    def forward(_pixels: Tensor, grid_thw: Tensor, **_kwargs: Any) -> ModelOutput:
        order, _ = get_vision_window_index(
            grid_thw,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return changed(output, pooler_output=tower.merger(output.last_hidden_state)[order.argsort()])

    return stand_in(tower, forward)


def merge_deepstack(tower: Any, output: ModelOutput) -> nn.Module:
    """An encoder that runs its own mergers on the last layer's patches and on every tap's."""

    def forward(_pixels: Tensor, **_kwargs: Any) -> ModelOutput:
        pairs = zip(tower.deepstack_merger_list, output.deepstack_features, strict=True)
        return changed(
            output,
            pooler_output=tower.merger(output.last_hidden_state),
            deepstack_features=[merger(tap) for merger, tap in pairs],
        )

    return stand_in(tower, forward)
