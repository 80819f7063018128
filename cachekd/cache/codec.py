"""Logprobs to small integers and back.

A logprob is stored as q = round(-logprob / step). Absolute values are quantised, so errors do not drift; then
each token's run of them is written as its first value and the gaps that follow, small and never negative. The
mass that is not kept is stored by itself, as log-odds against the mass that is: without it, the rounding of a
confident teacher's largest logprob would swamp its tail.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cachekd.cache.sparse_logits import offsets

TAIL_STEP = 1 / 32  # nats of log-odds
NO_TAIL = -(2**15)
_MOST_ODDS = 2**15 - 1
_MOST = 2**16 - 1
_FARTHEST = _MOST / 16  # nats: what is less probable than e**-4096 is nobody's target


def encode_logprobs(logprobs: NDArray[np.float32], k: NDArray, step: float) -> NDArray[np.uint16]:
    """[sum k] float32, descending in each run of k, to [sum k] uint16: first values and gaps.

    Values below -4,096 nats, or 65,535 steps where these are more, are stored as that. A gap ends at 65,535
    steps, which are 256 nats at a step of 1/256: what follows a larger one is stored as much too high.
    """
    most = max(_MOST, np.rint(_FARTHEST / step))
    quantised = np.clip(np.rint(-logprobs.astype(np.float64) / step), 0, most).astype(np.int64)
    gaps = np.diff(quantised, prepend=0)
    starts = offsets(k)[:-1][np.asarray(k) > 0]
    gaps[starts] = quantised[starts]
    return np.minimum(gaps, _MOST).astype(np.uint16)


def decode_logprobs(
    gaps: NDArray[np.uint16], k: NDArray, kept_logmass: NDArray[np.float32], step: float
) -> NDArray[np.float32]:
    """The inverse of `encode_logprobs`, rescaled per token so that the entries hold the mass that is kept.

    The rescaling moves all of a token's logprobs by the same amount: at most step / 2 for their own rounding,
    and TAIL_STEP / 2 for that of the odds. So values are within step + TAIL_STEP / 2 of the originals;
    differences, which are what DBiLD compares, within step.
    """
    k = np.asarray(k)
    rows, total = k > 0, np.cumsum(gaps, dtype=np.int64)  # rows without entries have nothing to rescale
    first = offsets(k)[:-1][rows]
    logprobs = (total - np.repeat(total[first] - gaps[first], k[rows])) * -step
    shift = kept_logmass[rows] - _logsumexp(logprobs, k)[rows]
    return (logprobs + np.repeat(shift, k[rows])).astype(np.float32)


def encode_tail(tail_logmass: NDArray, logprobs: NDArray, k: NDArray) -> NDArray[np.int16]:
    """[N] float32 log masses that are not kept to [N] int16: log-odds against the kept [sum k] logprobs.

    Odds keep both masses to the same precision, whichever is the smaller. NO_TAIL says that nothing is left.
    """
    with np.errstate(invalid="ignore"):
        odds = (tail_logmass - _logsumexp(logprobs.astype(np.float64), k)) / TAIL_STEP
    steps = np.clip(np.rint(np.nan_to_num(odds, neginf=0.0)), -_MOST_ODDS, _MOST_ODDS)
    return np.where(np.isneginf(tail_logmass), NO_TAIL, steps).astype(np.int16)


def decode_tail(codes: NDArray[np.int16]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The inverse of `encode_tail`: log masses [N] float32 that are not kept, and that are.

    Both are within TAIL_STEP / 2.
    """
    odds = np.where(codes == NO_TAIL, -np.inf, codes * TAIL_STEP)
    return -np.logaddexp(0, -odds).astype(np.float32), -np.logaddexp(0, odds).astype(np.float32)


def _logsumexp(logprobs: NDArray, k: NDArray) -> NDArray[np.float64]:
    """[N] float64, over each run of k; -inf where it is empty."""
    rows, starts = np.asarray(k) > 0, offsets(k)[:-1]
    result = np.full(len(rows), -np.inf)
    if rows.any():
        top = np.repeat(logprobs[starts[rows]], np.asarray(k)[rows])  # the first is the largest
        result[rows] = np.log(np.add.reduceat(np.exp(logprobs - top), starts[rows])) + logprobs[starts[rows]]
    return result


def rank_ids(ids: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Ids by frequency: small numbers for frequent ones, which is what an entropy coder wants.

    Returns:
        [R] the different ids, most frequent first (equally frequent ones ascending), and for every entry its
        place among them.
    """
    different, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return different[order], place[inverse]
