"""What seeds say: means and their errors, and paired differences with an interval. Pure functions.

A seed decides in what order a student reads, how new weights begin, and what else is random in its training.
Two variants with the same seed share all that, so their difference varies less from seed to seed than each of
them does: differences are taken seed by seed, and it is their spread that counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from scipy import stats

from cachekd.evaluate.scores import LEVEL


class Mean(BaseModel):
    """Of some values, one for each seed.

    Attributes:
        mean: arithmetic.
        standard_error: of the mean: their standard deviation (n - 1 in its denominator) over the root of n;
            None of one value.
        values: how many, n.
    """

    model_config = ConfigDict(extra="forbid")

    mean: float
    standard_error: float | None
    values: int


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error of at least one value."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(mean=fmean(values), standard_error=error, values=len(values))


class Paired(NamedTuple):
    """A difference of means over the same seeds.

    Attributes:
        mean: of the differences, with its standard error.
        half_width: of the 95 % interval, which is as wide to both sides; None where there is none: of one
            seed, or where all differences are equal (scores of a few questions are coarse): that they do not
            vary at all is not known from a few of them.
    """

    mean: Mean
    half_width: float | None


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """The paired t interval (Student 1908) of the mean of `ours[i] - theirs[i]`.

    The interval is right if the differences are about normally distributed. The mean over all seeds is likely
    to lie in it, with this data, this teacher and this test set.

    Args:
        ours, theirs: [n] scores with the same n seeds, in the same order; n at least 1.
    """
    found = mean_of([one - other for one, other in zip(ours, theirs, strict=True)])
    error, rounding = found.standard_error, 1e-12 * max(map(abs, [*ours, *theirs]))
    if error is None or error <= rounding:
        return Paired(found, None)
    return Paired(found, float(stats.t.ppf((1 + LEVEL) / 2, found.values - 1)) * error)
