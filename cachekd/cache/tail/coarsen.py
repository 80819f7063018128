"""A coarser tail sketch from a finer one's codes: no teacher, no hidden states.

The axes stay, since they do not depend on the step. With a coarser step the codes are smaller, and some axes
are no longer worth keeping. If the new step is an odd multiple of the old one, every new interval of rounding
is a union of old ones, so the codes are those that the states themselves would get. Otherwise the old
rounding is added to the new.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachekd.cache.array_rules import MOST_CODE
from cachekd.cache.sparse_logits import SketchCodes, TokenTargets
from cachekd.cache.tail.encoder import (
    BASIS_FINENESS,
    SketchEncoder,
    centroids,
    code_bytes,
    mass_surplus,
    sample_indices,
    worth_keeping,
)
from cachekd.cache.tail.setting import Codes, TailSetting
from cachekd.cache.tail.sketch import SHIFT_STEP, SketchTail, TailSketch
from cachekd.errors import CachekdError


@dataclass(frozen=True)
class Coarsening:
    """How codes of one sketch become those of another.

    Attributes:
        old: the one.
        encoder: the other, with what codes more tokens.
        kept: [C] bool, the axes that are left.
        factor: new steps over old ones.
        shift: steps of SHIFT_STEP by which tails had become too heavy.
    """

    old: TailSketch
    encoder: SketchEncoder
    kept: Tensor
    factor: float
    shift: int = 0

    def __call__(self, codes: SketchCodes) -> SketchCodes:
        """Turn [N, C] codes into [N, fewer] ones."""
        steps = _in_steps(self.old, torch.from_numpy(codes.coordinates))[:, self.kept]
        coordinates = (steps / self.factor).round().to(torch.int16).numpy()
        shift = np.clip(codes.shift.astype(np.int64) + self.shift, -MOST_CODE, MOST_CODE).astype(np.int16)
        return SketchCodes(coordinates, shift)


def coarsen(encoder: SketchEncoder, targets: TokenTargets, tail: TailSetting, where: str) -> Coarsening:
    """Find a coarser sketch.

    Args:
        encoder: the sketch that there is.
        targets: a sample of its tokens, with codes; their cost is what a budget is compared with.
        tail: what chooses the new step.
        where: the cache, for error messages.

    Raises:
        CachekdError: what is asked for is not coarser.
    """
    assert targets.sketch is not None
    steps = _in_steps(encoder.sketch, torch.from_numpy(targets.sketch.coordinates))
    if encoder.has_shift_axis:  # finer than a coarse sketch can use, and in steps of its own: left out
        steps[:, -1] = 0
    factor = _factor(encoder, steps, tail, where)
    kept = worth_keeping(steps, factor)
    first = Coarsening(encoder.sketch, _coarser(encoder, steps, kept, factor), kept, factor)
    # As when a sketch is fitted: rounding makes tails heavier on average, and the shift sees to it.
    chosen = sample_indices(len(targets))
    codes = targets.sketch
    some = SketchCodes(codes.coordinates[chosen.numpy()], codes.shift[chosen.numpy()])
    rebuilt = SketchTail.from_codes(first.encoder.sketch, first(some))
    shift = round(mass_surplus(rebuilt, targets, chosen) / SHIFT_STEP)
    direction, constant = encoder.common
    common = (direction, constant - shift * SHIFT_STEP)
    return replace(first, encoder=replace(first.encoder, common=common), shift=shift)


def _in_steps(sketch: TailSketch, coordinates: Tensor) -> Tensor:
    """[N, C] float32, what codes are rebuilt to, in their own steps."""
    return sketch.rebuild(coordinates) / sketch.unit


def _factor(encoder: SketchEncoder, steps: Tensor, tail: TailSetting, where: str) -> float:
    factor = tail.step(Codes(steps, unit=encoder.step, least=1.0, most=2.0**15))
    if factor <= 1:
        raise CachekdError(
            "the tail sketch cannot become finer than it is",
            where=where,
            expected=f"a step above {encoder.step:.6g} nats, or less than the "
            f"{code_bytes(steps, 1.0):.1f} bytes that its codes take by now",
            found=str(tail),
            fix="ask for less, or dump again: only the teacher knows what was rounded away",
        )
    return factor


def _coarser(encoder: SketchEncoder, steps: Tensor, kept: Tensor, factor: float) -> SketchEncoder:
    old = encoder.sketch
    unit = old.unit[kept] * factor
    finest = float(old.codes[:, kept].abs().max()) * old.basis_step / MOST_CODE
    basis_step = max(old.basis_step, encoder.step * factor / BASIS_FINENESS, finest)
    basis = old.codes[:, kept].float() * (old.basis_step / basis_step)
    sketch = TailSketch(
        codes=basis.round().to(torch.int16),
        basis_step=basis_step,
        offset=old.offset,
        unit=unit,
        centroids=centroids(steps[:, kept] * old.unit[kept], (steps[:, kept] / factor).round(), unit),
        softcap=old.softcap,
    )
    return replace(
        encoder, sketch=sketch, step=encoder.step * factor, analysis=encoder.analysis[kept] / factor
    )


def sampled_tokens(count: int, most: int) -> NDArray[np.int64]:
    """Pick up to `most` of `count` tokens, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))
