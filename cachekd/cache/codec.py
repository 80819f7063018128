"""Logprobs to small integers and back.

A logprob is stored as q = round(-logprob / step). Absolute values are quantised, so errors do not drift; then
each token's run of them is written as its first value and the gaps that follow, small and never negative. The
mass that is not kept has one byte of its own: without it, the rounding of a confident teacher's largest
logprob would swamp its tail.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.records import first_of_run, offsets

TAIL_STEP = 0.125  # nats; one byte reaches exp(-31.6)
NO_TAIL = 255


def encode_logprobs(logprobs: NDArray[np.float32], k: NDArray, step: float) -> NDArray[np.uint16]:
    """[sum k] float32, descending in each run of k, to [sum k] uint16: first values and gaps.

    Values below -65,535 steps are stored as that.
    """
    quantised = np.clip(np.rint(-logprobs.astype(np.float64) / step), 0, 65535).astype(np.int64)
    gaps = np.diff(quantised, prepend=0)
    starts = offsets(k)[:-1][np.asarray(k) > 0]
    gaps[starts] = quantised[starts]
    return gaps.astype(np.uint16)


def decode_logprobs(
    gaps: NDArray[np.uint16], k: NDArray, tail_logmass: NDArray[np.float32], step: float
) -> NDArray[np.float32]:
    """The inverse of `encode_logprobs`, rescaled per token so that kept and tail mass sum to 1.

    The rescaling moves all of a token's logprobs by the same amount, at most step / 2 for their own rounding
    and TAIL_STEP / 2 * m / (1 - m) for that of the tail mass m. So values are within one step and that of the
    originals; differences, which are what DBiLD compares, within one step.
    """
    total = np.cumsum(gaps, dtype=np.int64)
    first = first_of_run(k)
    logprobs = (total - (total[first] - gaps[first])) * -step
    if len(logprobs) == 0:
        return logprobs.astype(np.float32)
    # Rows without entries would confuse reduceat; they have nothing to rescale.
    rows = np.asarray(k) > 0
    mass = np.add.reduceat(np.exp(logprobs), offsets(k)[:-1][rows])
    shift = np.log1p(-np.exp(np.minimum(tail_logmass[rows].astype(np.float64), -1e-9))) - np.log(mass)
    return (logprobs + np.repeat(shift, np.asarray(k)[rows])).astype(np.float32)


def encode_tail(tail_logmass: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[N] float32 to [N] uint8: steps of an eighth of a nat below 0; 255 says that nothing is left."""
    steps = np.clip(np.rint(-np.nan_to_num(tail_logmass, neginf=0.0) / TAIL_STEP), 0, NO_TAIL - 1)
    return np.where(np.isneginf(tail_logmass), NO_TAIL, steps).astype(np.uint8)


def decode_tail(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The inverse of `encode_tail`, to within half a step (a factor of 1.065 in mass)."""
    return np.where(codes == NO_TAIL, -np.inf, codes * -TAIL_STEP).astype(np.float32)
