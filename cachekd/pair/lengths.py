"""How long a data set's samples are, beside what the models allow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cachekd.pair.rows import Row
from cachekd.samples import Limits, SampleEncoder, Samples, rough_lengths
from cachekd.samples.limits import LONGER


@dataclass(frozen=True)
class Lengths:
    """Tokens per sample, images and all. They are estimates: see `rough_lengths`.

    Attributes:
        samples: how many could be looked at; of the others no record can be read.
        median, p99, longest: tokens.
        limit: the most that a sample may have; None: any number.
        limit_of: whose limit that is.
        beyond: samples that are longer.
    """

    samples: int
    median: int
    p99: int
    longest: int
    limit: int | None
    limit_of: str
    beyond: int


def lengths_of(samples: Samples, encoder: SampleEncoder, limits: Limits) -> Lengths | None:
    """Of every sample's text, and a few samples' images.

    Returns:
        None where no sample can be read.

    Raises:
        CachekdError: the data set cannot be read, or none of many samples can be used.
    """
    found = np.array(rough_lengths(samples, encoder))
    found = found[found > 0]
    if not len(found):
        return None
    median, p99, longest = np.quantile(found, [0.5, 0.99, 1], method="higher").tolist()
    return Lengths(
        samples=len(found),
        median=median,
        p99=p99,
        longest=longest,
        limit=limits.max_tokens,
        limit_of=limits.max_tokens_of,
        beyond=0 if limits.max_tokens is None else int((found > limits.max_tokens).sum()),
    )


def length_row(lengths: Lengths | None) -> Row:
    """The distribution, and how many samples a dump and a run would refuse."""
    name = "length"
    if lengths is None:
        return Row(name, "note", "no record can be read", "mend the data")
    found = (
        f"about {lengths.median:,} tokens (median), {lengths.p99:,} (99th percentile), {lengths.longest:,} "
        f"(longest) in {lengths.samples:,} samples"
    )
    if lengths.limit is None:
        return Row(name, "ok", f"{found}; the models have no limit")
    allowed = f"{lengths.limit:,}, {lengths.limit_of}"
    if not lengths.beyond:
        return Row(name, "ok", f"{found}; none beyond {allowed}")
    return Row(name, "note", f"{found}; about {lengths.beyond:,} beyond {allowed}", LONGER)
