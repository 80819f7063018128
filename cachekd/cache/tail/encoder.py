"""Tokens are coded for the tail sketch: states rounded, coordinates taken, the output head kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachekd.cache.array_rules import MOST_CODE, ArrayRule
from cachekd.cache.container import pack_arrays, read_arrays
from cachekd.cache.manifest import SketchInfo
from cachekd.cache.sparse_logits import SketchCodes, TailStates, TokenTargets
from cachekd.cache.tail.sketch import (
    CENTROIDS,
    FINE_SHIFT_STEP,
    SHIFT_STEP,
    SKETCH_FORMAT,
    SketchTail,
    TailSketch,
    capped,
    read_sketch,
)

SAMPLED = 1024  # tokens whose whole logits are looked at
LEAST_POWER = 0.2  # an axis is kept if its mean square is this many steps squared
BASIS_FINENESS = 8  # the basis' rounding adds 1 / FINENESS**2 to the codes' noise
CODER_OVERHEAD = 1.03  # PCodec over the order-0 entropy
RULES = {
    "analysis": ArrayRule(("float32",), ("axes", "hidden")),
    "mean": ArrayRule(("float32",), ("hidden",)),
    "common": ArrayRule(("float32",), ("hidden",)),
    "numbers": ArrayRule(("float64",), (4,)),
}
ROWS = 8192  # of the weight at a time


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
    """The step at which the codes of `y` [N, C] cost `budget` bytes per token, between `low` and `high`."""
    if code_bytes(y, low) <= budget:
        return low
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
    """Pick up to SAMPLED of `count` tokens, evenly spread."""
    return torch.linspace(0, count - 1, min(SAMPLED, count)).long()


def mass_surplus(tail: SketchTail, targets: TokenTargets, chosen: Tensor) -> float:
    """Measure by how many nats the rebuilt tails are too heavy, on average.

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


@dataclass(frozen=True)
class SketchEncoder:
    """Turns hidden states into codes.

    Attributes:
        sketch: what undoes it.
        step: nats.
        mean: [d] float32, of the calibration tokens.
        analysis: [C, d] float32, code steps per hidden unit; a last row of zeros is the shift's axis.
        common: [d] float32 and a number: the part of the logits that is the same for every id.
        calibration_tokens: that it was fitted on.
        surplus: bytes per token by which codes of tokens that the axes were not fitted on cost more.
    """

    sketch: TailSketch
    step: float
    mean: Tensor
    analysis: Tensor
    common: tuple[Tensor, float]
    calibration_tokens: int
    surplus: float

    @property
    def has_shift_axis(self) -> bool:
        """Whether the last axis takes what the shift's rounding leaves (`cachekd.cache.tail.sketch`)."""
        return not self.analysis[-1].any()

    def encode(self, states: TailStates) -> SketchCodes:
        """Codes of N tokens; on the device of `states`, returned on the CPU."""
        device = states.hidden.device
        hidden = states.hidden.float()
        coordinates = (hidden - self.mean.to(device)) @ self.analysis.to(device).T
        direction, constant = self.common
        shift = (states.log_normaliser.float() - hidden @ direction.to(device) - constant) / SHIFT_STEP
        if self.has_shift_axis:
            coordinates[:, -1] = (shift.round() - shift) * (SHIFT_STEP / FINE_SHIFT_STEP)
        return SketchCodes(_codes(coordinates), _codes(shift))

    def pack(self) -> bytes:
        """The bytes of a cache's sketch file: what undoes the codes, and what makes more of them."""
        direction, constant = self.common
        arrays = {
            "analysis": self.analysis.cpu().numpy().astype("<f4"),
            "mean": self.mean.cpu().numpy().astype("<f4"),
            "common": direction.cpu().numpy().astype("<f4"),
            "numbers": np.array([self.step, constant, self.calibration_tokens, self.surplus], "<f8"),
        }
        return pack_arrays({**self.sketch.arrays(), **arrays}, SKETCH_FORMAT)


def sketch_info(name: str, encoder: SketchEncoder, content: bytes) -> SketchInfo:
    """What the manifest says of a sketch's file."""
    return SketchInfo(
        name=name,
        axes=encoder.sketch.axes,
        step=encoder.step,
        calibration_tokens=encoder.calibration_tokens,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def read_encoder(path: Path, sha256: str | None = None) -> SketchEncoder:
    """Read a cache's sketch file.

    Raises:
        CachekdError: it is missing, damaged, or for reading only.
    """
    sketch = read_sketch(path, sha256)
    arrays = read_arrays(path, list(RULES), SKETCH_FORMAT, sha256, RULES, {"axes": sketch.axes})
    tensors = {name: torch.from_numpy(arrays[name].copy()) for name in ("analysis", "mean", "common")}
    step, constant, tokens, surplus = arrays["numbers"].tolist()
    return SketchEncoder(
        sketch=sketch,
        step=step,
        mean=tensors["mean"],
        analysis=tensors["analysis"],
        common=(tensors["common"], constant),
        calibration_tokens=int(tokens),
        surplus=surplus,
    )


def _codes(values: Tensor) -> np.ndarray:
    return to_steps(values, 1.0).cpu().numpy()


@dataclass(frozen=True)
class OutputHead:
    """How a teacher's logits follow from its final hidden state: cap(weight . h + bias).

    Attributes:
        weight: [V, d] float, scaled by whatever the model scales its logits by; no padding rows.
        bias: [V] float, or None.
        softcap: see `TailSketch`.
        in_float32: whether it is applied in float32, whatever the weight's dtype: without the rounding of
            half precision, which is most of what a logit has behind its point.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    in_float32: bool = False

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply it: [N, V] float32 from [N, d]."""
        if self.in_float32:
            hidden, start = hidden.to(self.weight.device, torch.float32), 0
            logits = hidden.new_empty(len(hidden), len(self.weight))
            for rows in self.rows():
                logits[:, start : start + len(rows)] = hidden @ rows.T
                start += len(rows)
        else:
            logits = hidden.to(self.weight) @ self.weight.T
        return capped((logits if self.bias is None else logits + self.bias).float(), self.softcap)

    def rows(self) -> Iterator[Tensor]:
        """The weight in float32, ROWS rows at a time: a whole copy of it is seldom at hand."""
        return (rows.float() for rows in self.weight.split(ROWS))
