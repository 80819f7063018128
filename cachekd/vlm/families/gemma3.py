"""Gemma 3: patches pooled to `mm_tokens_per_image`; an image's tokens attend to each other both ways."""

from cachekd.vlm.families.family import Family
from cachekd.vlm.families.llava import GRID

GEMMA3 = Family("gemma3", shared=(*GRID, "mm_tokens_per_image"))
