"""LLaVA-NeXT (1.6): tiles from `image_grid_pinpoints`, unpadded and joined with P's `image_newline`."""

from cachekd.vlm.families.family import Family
from cachekd.vlm.families.llava import GRID, SELECTION

LLAVA_NEXT = Family("llava_next", shared=(*SELECTION, *GRID, "image_grid_pinpoints"))
