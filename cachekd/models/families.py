"""Every family of vision-language models: where its parts are, as one table."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import ModelOutput
from transformers.vision_utils import get_vision_window_index

from cachekd.errors import CachekdError
from cachekd.losses.terms import WITHOUT_SWITCH

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
    """Make an encoder that runs its own mergers on the last layer's patches and on every tap's.

    Qwen3-VL sends the outputs of some earlier layers to the language model's first layers. These deepstack
    features are part of what is switched: V's output holds, beside the last layer's patches, the patches of
    each tapped layer, before P's mergers for them.
    """

    def forward(_pixels: Tensor, **_kwargs: Any) -> ModelOutput:
        pairs = zip(tower.deepstack_merger_list, output.deepstack_features, strict=True)
        return changed(
            output,
            pooler_output=tower.merger(output.last_hidden_state),
            deepstack_features=[merger(tap) for merger, tap in pairs],
        )

    return stand_in(tower, forward)


# Inputs that only the vision encoder reads: the language model's forward must not see them again. Grids,
# image sizes and token types stay: positions and attention masks follow from them.
PIXEL_INPUTS = ("pixel_values", "pixel_attention_mask")


@dataclass(frozen=True)
class Family:
    """The facts of one family; everything else in `cachekd.models` is shared.

    Attributes:
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

    tower: str | None = "vision_tower"
    inside: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    replay: Replay = replay_output
    width: str = "hidden_size"
    shared: tuple[str, ...] = ()
    equally_many: tuple[str, ...] = ()


# Between V and P: which layer, and whether the class token goes.
SELECTION = ("vision_feature_layer", "vision_feature_select_strategy")
GRID = ("vision_config.image_size", "vision_config.patch_size")
_PATCHES = tuple(
    f"vision_config.{name}" for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")
)

# What is saved in Llava's layout too: CLIP, SigLIP or Pixtral encoders, any language model.
_LLAVA = Family(shared=(*SELECTION, *GRID))
_IDEFICS3 = Family(tower="vision_model", shared=(*GRID, "scale_factor"))
# The projector (`merger`) lies inside the vision encoder, so V's output is the merger's input.
_QWEN2_VL = Family(tower="visual", inside=("merger",), replay=merge_output, shared=_PATCHES)

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    # Tiles from the pinpoints, unpadded and joined with P's `image_newline`.
    "llava_next": replace(_LLAVA, shared=(*_LLAVA.shared, "image_grid_pinpoints")),
    # Tiles likewise, but a sample with several images has one tile per image.
    "llava_onevision": replace(
        _LLAVA, shared=(*_LLAVA.shared, "image_grid_pinpoints", "vision_aspect_ratio")
    ),
    # A connector with pixel shuffle; images that are all zero are padding.
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "qwen2_vl": replace(_QWEN2_VL, width="embed_dim"),
    # Patches are in the order of attention windows until they are merged.
    "qwen2_5_vl": replace(_QWEN2_VL, replay=merge_windows, shared=(*_PATCHES, "vision_config.window_size")),
    # V's output holds, beside the last layer's patches, those of each tapped layer, before P's mergers.
    "qwen3_vl": replace(
        _QWEN2_VL,
        inside=("merger", "deepstack_merger_list"),
        taps=("deepstack_merger_list",),
        replay=merge_deepstack,
        equally_many=("vision_config.deepstack_visual_indexes",),
    ),
    # 2.5 and 3 in transformers' own layout (`...-hf`): the class token goes, then pixel shuffle.
    "internvl": replace(_LLAVA, shared=(*_LLAVA.shared, "downsample_ratio")),
    # Image and question attend both ways, the answer (the processor's suffix) causally.
    "paligemma": Family(shared=GRID),
    # Patches are pooled to so many tokens an image, which attend to each other both ways.
    "gemma3": Family(shared=(*GRID, "mm_tokens_per_image")),
    # A Pixtral encoder for images of any size, then a norm and a patch merger.
    "mistral3": Family(shared=("vision_feature_layer", "vision_config.patch_size", "spatial_merge_size")),
    # A convolutional encoder, whose [B, C, H, W] output becomes tokens before P.
    "fast_vlm": Family(shared=(*SELECTION, "image_seq_length")),
}
# Causal language models: no vision encoder, so no switched path; L_CE and L_Align as for any other.
TEXT_ONLY = Family(tower=None)
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
    if model_type not in _GUESSED:
        _GUESSED[model_type] = _built_like_llava(config)
    if (guessed := _GUESSED[model_type]) is not None:
        return guessed
    raise CachekdError(
        "this model family is not supported",
        where=str(config.name_or_path or type(config).__name__),
        expected=f"model_type {', '.join(FAMILIES)}; a VLM built like Llava; or a causal language model",
        found=model_type,
    )


_GUESSED: dict[str, Family | None] = {}


def _built_like_llava(config: Any) -> Family | None:
    """A guess from names and signatures: one vision encoder, and the two entry points that the split uses."""
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
    return replace(FAMILIES["llava"], tower=towers[0]) if len(towers) == 1 else None


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
            fix=WITHOUT_SWITCH,
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
    """Find L without its head."""
    return model.get_decoder()
