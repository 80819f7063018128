"""PaliGemma 1 and 2: image and question attend both ways, the answer (the processor's suffix) causally."""

from cachekd.vlm.families.family import Family
from cachekd.vlm.families.llava import GRID

PALIGEMMA = Family("paligemma", shared=GRID)
