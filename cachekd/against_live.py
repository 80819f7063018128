"""How far one sample of a cache is from what the teacher says now."""

from __future__ import annotations

import torch
from torch import Tensor

from cachekd.cache import CachedTargets, CodecSettings, SketchTail, TailStates, UniformTail
from cachekd.cache.codec import TAIL_STEP
from cachekd.cache.tail.encoder import SketchEncoder
from cachekd.cache.tail.sketch import FINE_SHIFT_STEP, SHIFT_STEP


def value_bound(codec: CodecSettings, tolerance: float, cuts: int = 0) -> float:
    """Nats by which `value_error` may differ from 0: the codec's own bound, and the teacher's tolerance.

    Args:
        cuts: of `cachekd.cache.recompress.cuts`; each rounds the mass that is not kept again.
    """
    return codec.logprob_step + (1 + cuts) * TAIL_STEP / 2 + tolerance


def value_error(cached: CachedTargets, live: Tensor) -> float:
    """Largest error of a kept logprob, and without a sketch of the mass that is not kept; nats.

    Args:
        live: [N, V] float32, the teacher's logprobs.
    """
    kept = cached.logprobs.isfinite()
    error = (_at_kept(cached, live) - cached.logprobs)[kept].abs()
    if isinstance(cached.tail, UniformTail):
        others = (cached.vocab_size - cached.k).clamp(min=1)
        stored = cached.tail.logprob + others.log()
        found = _without_kept(cached, live).logsumexp(-1)
        error = torch.cat([error, torch.where(stored == found, 0.0, stored - found).abs()])
    return float(error.max()) if len(error) else 0.0


def order_error(cached: CachedTargets, live: Tensor) -> float:
    """By how many nats an id that is not kept is more probable than one that is; 0 or less if none is."""
    least = _at_kept(cached, live).masked_fill(~cached.logprobs.isfinite(), float("inf")).amin(-1)
    return float((_without_kept(cached, live).amax(-1) - least).max())


def knee_error(cached: CachedTargets, live: Tensor, codec: CodecSettings) -> float:
    """By how many nats Kneedle's curve is less deep at the stored knee than at its deepest."""
    values = live.topk(min(codec.window, live.shape[-1]), dim=-1).values
    span = values[:, :1] - values[:, -1:]
    depth = span * (1 - torch.arange(values.shape[1]) / max(1, values.shape[1] - 1)) - (
        values - values[:, -1:]
    )
    at_knee = depth.gather(-1, (cached.knee[:, None] - 1).clamp(0, values.shape[1] - 1))
    missed = (depth.amax(-1, keepdim=True) - at_knee)[:, 0]
    return float(missed.masked_fill(cached.knee >= codec.top_k, 0.0).max())  # there top_k cut it short


def code_bound(encoder: SketchEncoder, tolerance: float) -> float:
    """Steps by which `code_error` may differ from 0: rounding to the other side, and the tolerance."""
    return 1 + tolerance / min(encoder.step, SHIFT_STEP)


def code_error(cached: CachedTargets, states: TailStates, encoder: SketchEncoder) -> float:
    """Largest difference of a code of the tail sketch, steps."""
    assert isinstance(cached.tail, SketchTail)
    codes = encoder.encode(states)
    coordinates = torch.from_numpy(codes.coordinates).int() - cached.tail.coordinates.int()
    shift = torch.from_numpy(codes.shift).float() - cached.tail.shift / SHIFT_STEP
    if encoder.has_shift_axis:  # from one step of the shift to the next it begins anew
        shift = shift - coordinates[:, -1] * (FINE_SHIFT_STEP / SHIFT_STEP)
        coordinates = coordinates[:, :-1]
    return max(float(off.abs().max()) for off in (coordinates, shift) if off.numel())


def _at_kept(cached: CachedTargets, live: Tensor) -> Tensor:
    return live.gather(-1, cached.ids.clamp(max=live.shape[-1] - 1))


def _without_kept(cached: CachedTargets, live: Tensor) -> Tensor:
    """The logprobs of ids that are not kept; -inf at those that are."""
    wide = torch.nn.functional.pad(live, (0, 1))  # padding has an id beyond the vocabulary
    return wide.scatter(-1, cached.ids.clamp(max=live.shape[-1]), float("-inf"))[:, :-1]
