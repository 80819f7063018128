"""Mistral Small 3.1: a Pixtral encoder for images of any size, then a norm and a patch merger."""

from cachekd.vlm.families.family import Family

MISTRAL3 = Family(
    "mistral3", shared=("vision_feature_layer", "vision_config.patch_size", "spatial_merge_size")
)
