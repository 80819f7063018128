"""What a data set's samples are like: how many, how long, with or without images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cachekd.pair.rows import Row
from cachekd.samples import Limits, Survey
from cachekd.samples.limits import LONGER
from cachekd.samples.protocol import DataNotes


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


def lengths_of(found: Survey, limits: Limits) -> Lengths | None:
    """Of the samples that were looked at; None where no record can be read."""
    lengths = found.lengths[found.lengths > 0]
    if not len(lengths):
        return None
    median, p99, longest = np.quantile(lengths, [0.5, 0.99, 1], method="higher").tolist()
    return Lengths(
        samples=len(lengths),
        median=median,
        p99=p99,
        longest=longest,
        limit=limits.max_tokens,
        limit_of=limits.max_tokens_of,
        beyond=0 if limits.max_tokens is None else int((lengths > limits.max_tokens).sum()),
    )


@dataclass(frozen=True)
class Counts:
    """Of a data set's samples and files.

    Attributes:
        samples: that were looked at.
        without_image: samples of text alone.
        unreadable: samples of which no record can be read.
        repeated_keys, left_out: see `DataNotes`, of the whole data set.
    """

    samples: int
    without_image: int
    unreadable: int
    repeated_keys: int
    left_out: int


def counts_of(found: Survey, notes: DataNotes) -> Counts:
    """Of the samples that were looked at."""
    there = found.lengths > 0
    return Counts(
        samples=len(there),
        without_image=int((there & (found.images == 0)).sum()),
        unreadable=int((~there).sum()),
        repeated_keys=notes.repeated_keys,
        left_out=len(notes.left_out),
    )


def data_row(counts: Counts, notes: DataNotes, *, takes_images: bool) -> Row:
    """How many samples there are, and what of them one would want to know.

    Args:
        takes_images: whether both models do.
    """
    found = [f"{counts.samples:,} samples, {counts.without_image:,} of them without an image"]
    if counts.unreadable:
        found.append(f"{counts.unreadable:,} whose record cannot be read")
    if counts.repeated_keys:
        found.append(f"{counts.repeated_keys:,} whose key came before: they have #2, #3, ... behind it")
    if counts.left_out:
        found.append(f"{counts.left_out:,} files that are no data, such as {notes.left_out[0]}")
    text = "; ".join(found)
    if takes_images and counts.without_image == counts.samples:
        fix = "--image-field NAME takes images from another field; texts alone train with --lambda-vsd 0"
        return Row("data", "refused", text, fix)
    return Row("data", "note" if found[1:] else "ok", text, "nothing, if it is meant" if found[1:] else None)


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
