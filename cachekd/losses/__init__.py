"""Kneedle, DBiLD and the losses that it is compared with: pure functions of student logits and
`TeacherTargets`.

Loss `x` is `x_loss` in `cachekd/losses/x.py`; its settings stand in the table `cachekd.config.losses.LOSSES`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachekd.losses.bild import bild_loss
    from cachekd.losses.chunked import chunk_tokens, summed_over_chunks
    from cachekd.losses.cross_entropy import cross_entropy_loss
    from cachekd.losses.dbild import dbild_loss
    from cachekd.losses.forward_kl import forward_kl_loss
    from cachekd.losses.jsd import jsd_loss
    from cachekd.losses.kneedle import kneedle_k
    from cachekd.losses.mse import mse_loss
    from cachekd.losses.reverse_kl import reverse_kl_loss
    from cachekd.losses.topk_kl import topk_kl_loss


__all__ = [
    "bild_loss",
    "chunk_tokens",
    "cross_entropy_loss",
    "dbild_loss",
    "forward_kl_loss",
    "jsd_loss",
    "kneedle_k",
    "mse_loss",
    "reverse_kl_loss",
    "summed_over_chunks",
    "topk_kl_loss",
]

# Imported on first use: who reads the table of terms alone need not wait for torch.
_HOME = {"chunk_tokens": "chunked", "kneedle_k": "kneedle", "summed_over_chunks": "chunked"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cachekd.losses' has no attribute {name!r}")
    return getattr(import_module(f"cachekd.losses.{_HOME.get(name, name.removesuffix('_loss'))}"), name)


def loss_function(name: str) -> Any:
    """Import the loss of that name: a function of [N, V] logits, `TeacherTargets`, its settings by name, and
    `reduction`."""
    return getattr(import_module(f"cachekd.losses.{name}"), f"{name}_loss")
