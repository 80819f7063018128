"""LLaVA-OneVision: tiles as in LLaVA-NeXT, but a sample with several images has one tile per image."""

from cachekd.vlm.families.family import Family
from cachekd.vlm.families.llava import GRID, SELECTION

LLAVA_ONEVISION = Family(
    "llava_onevision", shared=(*SELECTION, *GRID, "image_grid_pinpoints", "vision_aspect_ratio")
)
