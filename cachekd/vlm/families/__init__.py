"""What differs between VLM families: one small file each, found by `config.model_type`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from cachekd.errors import CachekdError
from cachekd.vlm.families.family import PIXEL_INPUTS, Family, changed
from cachekd.vlm.families.fast_vlm import FAST_VLM
from cachekd.vlm.families.gemma3 import GEMMA3
from cachekd.vlm.families.idefics3 import IDEFICS3
from cachekd.vlm.families.internvl import INTERNVL
from cachekd.vlm.families.llava import LLAVA
from cachekd.vlm.families.llava_next import LLAVA_NEXT
from cachekd.vlm.families.llava_onevision import LLAVA_ONEVISION
from cachekd.vlm.families.mistral3 import MISTRAL3
from cachekd.vlm.families.paligemma import PALIGEMMA
from cachekd.vlm.families.probe import probe
from cachekd.vlm.families.qwen2_5_vl import QWEN2_5_VL
from cachekd.vlm.families.qwen2_vl import QWEN2_VL
from cachekd.vlm.families.qwen3_vl import QWEN3_VL
from cachekd.vlm.families.smolvlm import SMOLVLM
from cachekd.vlm.families.text_only import TEXT_ONLY

__all__ = [
    "FAMILIES",
    "PIXEL_INPUTS",
    "TEXT_ONLY",
    "Family",
    "changed",
    "family_of",
    "language_model",
    "projectors_in_tower",
    "vision_tower",
    "vision_tower_name",
]

FAMILIES: dict[str, Family] = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "internvl": INTERNVL,
    "paligemma": PALIGEMMA,
    "gemma3": GEMMA3,
    "mistral3": MISTRAL3,
    "fast_vlm": FAST_VLM,
}
# Encoders (BERT) have a causal head too; some VLMs are listed as causal models as well.
_LANGUAGE_MODELS = (
    set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    - set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    - set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
)


def family_of(config: Any) -> Family:
    """The family of a model's configuration; `TEXT_ONLY` for a causal language model.

    An unknown VLM that is built like Llava is taken for one: `prove_split` confirms that before it trains.

    Raises:
        CachekdError: the family is not supported.
    """
    model_type = config.model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in _LANGUAGE_MODELS:
        return TEXT_ONLY
    guessed = probe(config)
    if guessed is not None:
        return guessed
    raise CachekdError(
        "this model family is not supported",
        where=str(config.name_or_path or type(config).__name__),
        expected=f"model_type {', '.join(FAMILIES)}; a VLM built like Llava; or a causal language model",
        found=model_type,
    )


def vision_tower_name(config: Any) -> str:
    """The attribute of the inner model (`model.model`) that holds the vision encoder.

    Raises:
        CachekdError: the family is not supported, or has no vision encoder.
    """
    family = family_of(config)
    if family.tower is None:
        raise CachekdError(
            "the model has no vision encoder: it is a language model",
            where=str(config.name_or_path or type(config).__name__),
            found=config.model_type,
            fix="leave the switched path out: --lambda-vsd 0",
        )
    return family.tower


def vision_tower(model: PreTrainedModel) -> nn.Module:
    """The vision encoder of a VLM (the outer, `...ForConditionalGeneration` model).

    In some families it contains modules of the projector: see `projectors_in_tower`.
    """
    return getattr(model.model, vision_tower_name(model.config))


def projectors_in_tower(model: PreTrainedModel) -> list[nn.Module]:
    """Modules inside the vision encoder that belong to P; none in most families."""
    family = family_of(model.config)
    return [getattr(vision_tower(model), name) for name in family.inside]


def language_model(model: PreTrainedModel) -> nn.Module:
    """L without its head."""
    return model.get_decoder()
