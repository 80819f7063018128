"""SmolVLM: Idefics3's architecture under its own name."""

from dataclasses import replace

from cachekd.vlm.families.idefics3 import IDEFICS3

SMOLVLM = replace(IDEFICS3, model_type="smolvlm")
