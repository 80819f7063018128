"""Floating point operations, counted while they are done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")


class FlopCounter(TorchDispatchMode):
    """Adds up the products of what runs within, forward and backward: of m x k by k x n 2 m n k operations.

    The formulas are torch's, but attention's: those know no CPU, and fail where keys have fewer heads. A
    causal mask makes no difference: all positions count. `FlopCounterMode` itself takes some operations apart
    (silu's backward) and so rounds otherwise; here everything runs as it does without.

    Attributes:
        flops: so far.
        failed: an operation whose formula failed; None: none did.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.failed: str | None = None
        self._formulas = FlopCounterMode(display=False, custom_mapping=_attentions()).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(getattr(func, "overloadpacket", func))
        if formula is not None:
            try:
                self.flops += formula(*args, **(kwargs or {}), out_val=out)
            except Exception:  # a count is no reason to stop what is counted
                self.failed = str(func)
        return out


def _attentions() -> dict[Any, Callable[..., int]]:
    found: dict[Any, Callable[..., int]] = {}
    for name in _ATTENTION:
        forward = getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None)
        backward = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward", None)
        if forward is not None and backward is not None:
            found |= {forward: _forward, backward: _backward}
    return found


def _forward(query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, heads, rows, width = query
    return 4 * batch * heads * rows * key[2] * width  # scores, and what they take of the values


def _backward(_gradient: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, heads, rows, width = query
    return 10 * batch * heads * rows * key[2] * width  # five products: the scores are made again
