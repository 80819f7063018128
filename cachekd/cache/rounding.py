"""What rounding costs and leaves, along the axes of a tail sketch: for one that is fitted or made coarser."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cachekd.cache.array_rules import MOST_CODE
from cachekd.cache.records import TokenTargets
from cachekd.cache.sketch import CENTROIDS, SketchTail

SAMPLED = 1024  # tokens whose whole logits are looked at
LEAST_POWER = 0.2  # an axis is kept if its mean square is this many steps squared
BASIS_FINENESS = 8  # the basis' rounding adds 1 / FINENESS**2 to the codes' noise
CODER_OVERHEAD = 1.03  # PCodec over the order-0 entropy


def to_steps(values: Tensor, step: float) -> Tensor:
    """int16 of the same shape; what lies beyond the ends is cut to them."""
    return (values / step).round().clamp(-MOST_CODE, MOST_CODE).to(torch.int16)


def worth_keeping(y: Tensor, step: float) -> Tensor:
    """[C] bool: the axes of `y` [N, C] whose loss would cost more than rounding does; at least one.

    By their power, not by how often they are in use: what is rare and large must not be lost.
    """
    power = y.square().mean(0)
    use = power >= LEAST_POWER * step**2
    use[power.argmax()] = True
    return use


def code_bytes(y: Tensor, step: float) -> float:
    """Order-0 entropy of the codes of `y` [N, C], axis by axis; bytes per token with the coder's overhead."""
    kept = y[:, worth_keeping(y, step)].cpu().numpy()
    codes = np.clip(np.rint(kept / step), -(2**15), 2**15 - 1).astype(np.int64)
    low, width = codes.min(), int(codes.max() - codes.min()) + 1
    bits = 0.0
    for column in codes.T:
        counts = np.bincount(column - low, minlength=width)
        share = counts[counts > 0] / len(codes)
        bits -= float((share * np.log2(share)).sum())
    return bits / 8 * CODER_OVERHEAD


def step_for(budget: float, y: Tensor, low: float, high: float) -> float:
    """The step between `low` and `high` at which the codes of `y` [N, C] cost `budget` bytes per token."""
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if code_bytes(y, middle) > budget else (low, middle)
    return high


def centroids(y: Tensor, codes: Tensor, unit: Tensor) -> Tensor:
    """[CENTROIDS, C], the mean of what was coded as 1, 2; the middle where too few were."""
    rows = []
    for magnitude in range(1, CENTROIDS + 1):
        chosen = codes.abs() == magnitude
        mean = (y.abs() * chosen).sum(0) / chosen.sum(0).clamp(min=1)
        rows.append(torch.where(chosen.sum(0) >= 16, mean, magnitude * unit))
    return torch.stack(rows)


def sample_indices(count: int) -> Tensor:
    """Up to SAMPLED of `count` tokens, evenly spread."""
    return torch.linspace(0, count - 1, min(SAMPLED, count)).long()


def mass_surplus(tail: SketchTail, targets: TokenTargets, chosen: Tensor) -> float:
    """By how many nats the rebuilt tails are too heavy, on average.

    Rounding moves every logit, and the exponential of that is not right on average.

    Args:
        tail: of the chosen tokens.
        targets: what is kept of all tokens.
        chosen: [n] int64, which of them.
    """
    surplus = []
    for places in torch.arange(len(chosen)).split(64):
        logprobs = tail.select(places.to(tail.shift.device)).everywhere(tail.sketch.vocab_size)
        for row, token in zip(logprobs, chosen[places].tolist(), strict=True):
            kept = targets.cut(token, token + 1)
            if kept.tail_logmass[0] > -12:  # something is left that matters
                row[torch.from_numpy(kept.ids.astype(np.int64)).to(row.device)] = float("-inf")
                surplus.append(float(row.logsumexp(-1)) - float(kept.tail_logmass[0]))
    return float(np.mean(surplus)) if surplus else 0.0
