"""Llava 1.5, and what is saved in its layout (CLIP, SigLIP or Pixtral towers, any language model)."""

from cachekd.vlm.families.family import Family

# Between V and P: which layer, and whether the class token goes.
SELECTION = ("vision_feature_layer", "vision_feature_select_strategy")
GRID = ("vision_config.image_size", "vision_config.patch_size")

LLAVA = Family("llava", shared=(*SELECTION, *GRID))
