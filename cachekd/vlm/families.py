"""What differs between VLM families; everything else in `cachekd.vlm` is shared."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cachekd.errors import CachekdError

# model_type -> the vision encoder's attribute in the inner model (`model.model`).
VISION_TOWER = {
    "llava": "vision_tower",
}


def vision_tower_name(config: Any) -> str:
    """The attribute of the inner model that holds the vision encoder.

    Raises:
        CachekdError: the family is not supported.
    """
    if config.model_type not in VISION_TOWER:
        raise CachekdError(
            "this model family is not supported",
            where=str(config.name_or_path or type(config).__name__),
            expected=f"model_type {' or '.join(VISION_TOWER)}",
            found=config.model_type,
        )
    return VISION_TOWER[config.model_type]


def vision_tower(model: PreTrainedModel) -> nn.Module:
    """The vision encoder of a VLM (the outer, `...ForConditionalGeneration` model)."""
    return getattr(model.model, vision_tower_name(model.config))
