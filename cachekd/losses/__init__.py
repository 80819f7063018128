"""Kneedle, DBiLD and its baselines: pure functions of student logits and `TeacherTargets`."""

from cachekd.losses.baselines import (
    bild_loss,
    cross_entropy_loss,
    forward_kl_loss,
    reverse_kl_loss,
    topk_kl_loss,
)
from cachekd.losses.chunked import chunk_tokens, summed_over_chunks
from cachekd.losses.dbild import dbild_loss
from cachekd.losses.kneedle import kneedle_k

__all__ = [
    "bild_loss",
    "chunk_tokens",
    "cross_entropy_loss",
    "dbild_loss",
    "forward_kl_loss",
    "kneedle_k",
    "reverse_kl_loss",
    "summed_over_chunks",
    "topk_kl_loss",
]
