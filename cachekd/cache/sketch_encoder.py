"""Hidden states to the codes of a tail sketch that was fitted before."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachekd.cache.array_rules import ArrayRule
from cachekd.cache.arrays import pack_arrays, read_arrays
from cachekd.cache.manifest import SketchInfo
from cachekd.cache.records import SketchCodes, TailStates
from cachekd.cache.rounding import to_steps
from cachekd.cache.sketch import FINE_SHIFT_STEP, SHIFT_STEP, SKETCH_FORMAT, TailSketch, read_sketch

RULES = {
    "analysis": ArrayRule(("float32",), ("axes", "hidden")),
    "mean": ArrayRule(("float32",), ("hidden",)),
    "common": ArrayRule(("float32",), ("hidden",)),
    "numbers": ArrayRule(("float64",), (4,)),
}


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
        """Whether the last axis takes what the shift's rounding leaves (`cachekd.cache.sketch`)."""
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
    """From a cache's sketch file.

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
