"""Kneedle, DBiLD and its baselines: pure functions of student logits and `TeacherTargets`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported on first use: who reads the table of terms alone need not wait for torch.
_HOME = {
    "chunk_tokens": "chunked",
    "dbild_loss": "dbild",
    "kneedle_k": "kneedle",
    "summed_over_chunks": "chunked",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cachekd.losses' has no attribute {name!r}")
    return getattr(import_module(f"cachekd.losses.{_HOME.get(name, 'baselines')}"), name)
