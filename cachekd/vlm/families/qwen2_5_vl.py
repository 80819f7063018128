"""Qwen2.5-VL: as Qwen2-VL, with patches in the order of attention windows until they are merged."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput
from transformers.vision_utils import get_vision_window_index

from cachekd.vlm.families.family import Family, changed, stand_in
from cachekd.vlm.families.qwen2_vl import PATCHES


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


QWEN2_5_VL = Family(
    "qwen2_5_vl",
    tower="visual",
    inside=("merger",),
    replay=merge_windows,
    shared=(*PATCHES, "vision_config.window_size"),
)
