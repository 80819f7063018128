"""InternVL 2.5 and 3 in transformers' own layout (`...-hf`): the class token goes, then pixel shuffle."""

from cachekd.vlm.families.family import Family
from cachekd.vlm.families.llava import GRID, SELECTION

INTERNVL = Family("internvl", shared=(*SELECTION, *GRID, "downsample_ratio"))
