"""Qwen2-VL: the projector (`merger`) lies inside the vision encoder, so V's output is the merger's input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from cachekd.vlm.families.family import Family, changed, stand_in

PATCHES = tuple(
    f"vision_config.{name}" for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")
)


def merge_output(tower: Any, output: ModelOutput) -> nn.Module:
    """An encoder that runs its own merger on the patches [P, d] of `output`."""

    def forward(_pixels: Tensor, **_kwargs: Any) -> ModelOutput:
        return changed(output, pooler_output=tower.merger(output.last_hidden_state))

    return stand_in(tower, forward)


QWEN2_VL = Family(
    "qwen2_vl", tower="visual", inside=("merger",), replay=merge_output, width="embed_dim", shared=PATCHES
)
