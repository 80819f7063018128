"""Idefics3 and SmolVLM: a connector with pixel shuffle; images that are all zero are padding."""

from cachekd.vlm.families.family import Family
from cachekd.vlm.families.llava import GRID

IDEFICS3 = Family("idefics3", tower="vision_model", shared=(*GRID, "scale_factor"))
