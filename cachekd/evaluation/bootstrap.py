"""How sure a difference between two rows of an evaluation is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
_AT_A_TIME = 2**24  # numbers drawn


class Interval(NamedTuple):
    """What a difference may be, with 95 % confidence."""

    low: float
    high: float


def paired_interval(
    ours: NDArray[np.bool_], theirs: NDArray[np.bool_], per_sample: Sequence[int]
) -> Interval:
    """The 95 % interval of the difference between two shares of right answers to the same questions.

    A bootstrap over samples: the questions about one picture are not independent of each other, so whole
    samples are drawn, with all their questions, and from both sides alike (Koehn 2004, paired; Efron's
    percentile interval). The same answers give the same interval.

    Args:
        ours, theirs: [Q] bool, whether each question was answered rightly.
        per_sample: [S], how many of the Q questions, in their order, are each sample's; each at least 1.

    Returns:
        of `ours.mean() - theirs.mean()`.
    """
    starts = np.concatenate([[0], np.cumsum(per_sample)[:-1]]).astype(np.int64)
    gained = np.add.reduceat(ours.astype(np.int64) - theirs.astype(np.int64), starts)
    asked = np.asarray(per_sample, np.int64)
    samples = len(asked)
    random = np.random.default_rng(0)
    differences: list[NDArray[np.float64]] = []
    left = RESAMPLES
    while left:
        some = min(left, max(1, _AT_A_TIME // samples))
        drawn = random.integers(samples, size=(some, samples))
        differences.append(gained[drawn].sum(1) / asked[drawn].sum(1))
        left -= some
    tail = (1 - LEVEL) / 2
    return Interval(*np.quantile(np.concatenate(differences), [tail, 1 - tail]).tolist())
