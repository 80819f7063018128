"""Qwen3-VL: as Qwen2-VL, and the outputs of some earlier layers go to the language model's first layers.

These deepstack features are part of what is switched: V's output holds, beside the last layer's patches, the
patches of each tapped layer, before P's mergers for them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from cachekd.vlm.families.family import Family, changed, stand_in
from cachekd.vlm.families.qwen2_vl import PATCHES


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


QWEN3_VL = Family(
    "qwen3_vl",
    tower="visual",
    inside=("merger", "deepstack_merger_list"),
    taps=("deepstack_merger_list",),
    replay=merge_deepstack,
    shared=PATCHES,
    equally_many=("vision_config.deepstack_visual_indexes",),
)
