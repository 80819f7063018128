"""FastVLM: a convolutional encoder, whose [B, C, H, W] output becomes tokens before P."""

from cachekd.vlm.families.family import Family
from cachekd.vlm.families.llava import SELECTION

FAST_VLM = Family("fast_vlm", shared=(*SELECTION, "image_seq_length"))
