"""How sure differences between rows of an evaluation are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
FEWEST_SAMPLES = 10  # of less a percentile interval promises too much: of one sample it has no width
_AT_A_TIME = 2**23  # numbers drawn


class Interval(NamedTuple):
    """What a difference may be, with 95 % confidence; None of too few samples."""

    low: float | None
    high: float | None


def paired_intervals(
    right: NDArray[np.bool_], pairs: Sequence[tuple[int, int]], per_sample: Sequence[int]
) -> list[Interval]:
    """The 95 % intervals of differences between shares of right answers to the same questions.

    A bootstrap over samples: the questions about one picture are not independent of each other, so whole
    samples are drawn, with all their questions, and of all rows alike (Koehn 2004, paired; Efron's percentile
    interval). The same answers give the same intervals.

    Args:
        right: [R, Q] bool, which of the Q questions each of R rows answers rightly.
        pairs: rows, by their numbers.
        per_sample: [S], how many of the Q questions, in their order, are each sample's; each at least 1.

    Returns:
        for each pair (i, j), of `right[i].mean() - right[j].mean()`.
    """
    samples = len(per_sample)
    if samples < FEWEST_SAMPLES or not pairs:
        return [Interval(None, None)] * len(pairs)
    starts = np.concatenate([[0], np.cumsum(per_sample)[:-1]]).astype(np.int64)
    hits = np.add.reduceat(right.astype(np.int32), starts, axis=1)
    first, second = np.transpose(pairs)
    gained = (hits[first] - hits[second]).astype(np.float64)  # [pairs, S]
    asked = np.asarray(per_sample, np.float64)
    random = np.random.default_rng(0)
    found = []
    for start in range(0, RESAMPLES, some := max(1, _AT_A_TIME // samples)):
        rows = min(some, RESAMPLES - start)
        drawn = random.integers(samples, size=(rows, samples))
        drawn += np.arange(rows)[:, None] * samples
        times = np.bincount(drawn.ravel(), minlength=rows * samples).reshape(rows, samples).astype(np.float64)
        found.append((times @ gained.T) / (times @ asked)[:, None])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail], axis=0)
    return [Interval(*ends) for ends in zip(low.tolist(), high.tolist(), strict=True)]
