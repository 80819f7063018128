"""A family that nobody wrote down: is it built like Llava?"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from cachekd.vlm.families.family import Family
from cachekd.vlm.families.llava import GRID, SELECTION

_PROBED: dict[str, Family | None] = {}


def probe(config: Any) -> Family | None:
    """Look for one vision encoder and the two entry points that the split uses.

    A guess from names and signatures; `prove_split` must confirm it on a batch.

    Returns:
        None where the model is built in another way.
    """
    if config.model_type not in _PROBED:
        _PROBED[config.model_type] = _look(config)
    return _PROBED[config.model_type]


def _look(config: Any) -> Family | None:
    model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    vision_config = getattr(config, "vision_config", None)
    if model_class is None or vision_config is None:
        return None
    with torch.device("meta"):  # the modules without their weights
        outer = model_class(copy.deepcopy(config))
    inner: Any = getattr(outer, "model", None)
    if getattr(inner, "get_image_features", None) is None:
        return None
    if "logits_to_keep" not in inspect.signature(outer.forward).parameters:
        return None
    if "mm_encoder_outputs" not in inspect.signature(inner.forward).parameters:
        return None
    towers = [
        name
        for name, module in inner.named_children()
        if type(getattr(module, "config", None)) is type(vision_config)
    ]
    return (
        Family(config.model_type, tower=towers[0], shared=(*SELECTION, *GRID)) if len(towers) == 1 else None
    )
