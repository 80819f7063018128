"""Causal language models: no vision encoder, so no switched path; L_CE and L_Align as for any other."""

from cachekd.vlm.families.family import Family

TEXT_ONLY = Family("text_only", tower=None)
