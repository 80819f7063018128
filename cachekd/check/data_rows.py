"""What a data set's samples are like: how many, how long, with or without images; and what teacher and
student make of the first of them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cachekd.check.rows import Row, State
from cachekd.config import DataOptions
from cachekd.data import Encoded, Limits, Samples, Survey
from cachekd.data.limits import LONGER, NO_ROW
from cachekd.data.sample import DataNotes
from cachekd.errors import BadSample
from cachekd.losses.terms import WITHOUT_SWITCH, labels
from cachekd.models import ModelFiles

_TEXT_ALONE = f"--image-field NAME takes the pictures of another field; or {WITHOUT_SWITCH}"
_INTENDED = "nothing to do if this is intended"


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
    """Sum up the lengths of the samples that were looked at; None where no record can be read."""
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
    """How many samples and files a data set has.

    Attributes:
        samples: in all.
        looked_at: of these, all or a part at random.
        without_image: of those, the ones of text alone.
        unreadable: of those, the ones whose record cannot be read.
        repeated_keys, other_files: see `DataNotes`.
    """

    samples: int
    looked_at: int
    without_image: int
    unreadable: int
    repeated_keys: int
    other_files: int


def counts_of(found: Survey, samples: Samples) -> Counts:
    """Count what a data set has, by the samples that were looked at."""
    there, notes = found.lengths > 0, samples.notes
    return Counts(
        samples=len(samples),
        looked_at=len(there),
        without_image=int((there & (found.images == 0)).sum()),
        unreadable=int((~there).sum()),
        repeated_keys=notes.repeated_keys,
        other_files=len(notes.other_files),
    )


def data_row(counts: Counts, notes: DataNotes, *, takes_images: bool) -> Row:
    """How many samples there are, and what of them one would want to know.

    Args:
        takes_images: whether both models do.
    """
    whole = counts.looked_at == counts.samples
    of_them = "of them" if whole else f"of {counts.looked_at:,} of them"
    found = [f"{counts.samples:,} samples, {counts.without_image:,} {of_them} without an image"]
    if counts.unreadable:
        found.append(f"{counts.unreadable:,} whose record cannot be read")
    if counts.repeated_keys:
        found.append(f"{counts.repeated_keys:,} with the key of an earlier one: they get #2, #3, ...")
    if counts.other_files:
        found.append(f"{counts.other_files:,} files that are no data, such as {notes.other_files[0]}")
    text = "; ".join(found)
    if takes_images and counts.without_image == counts.looked_at:
        return Row("data", "refused" if whole else "note", text, _TEXT_ALONE)
    return Row("data", "note" if found[1:] else "ok", text, _INTENDED if found[1:] else None)


def length_row(lengths: Lengths | None, data: DataOptions) -> Row:
    """The distribution, and how many samples are too long; refused where one of them would stop a dump.

    Args:
        data: says what becomes of them.
    """
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
    beyond = f"{found}; about {lengths.beyond:,} beyond {allowed}"
    if data.too_long == "cut":
        return Row(name, "note", f"{beyond}, which are cut", _INTENDED)
    if data.too_long == "skip" or data.on_error == "skip":
        return Row(name, "note", f"{beyond}, which are left out", _INTENDED)
    return Row(name, "refused", beyond, LONGER)


def pictures_row(data: str, samples: Samples, cache: Container[str] | None, switched: Sequence[str]) -> Row:
    """Whether some sample has a picture: text alone has nothing to switch.

    Args:
        cache: of a sample that is not in it, L_CE alone is computed; None: of all samples everything is.
        switched: the terms of the switched path that are on.
    """
    if has_pictures(samples, cache):
        return Row("pictures", "ok", "some samples that are distilled have one")
    distilled = sum(cache is None or key in cache for key in samples.keys)
    return Row(
        "pictures",
        "refused",
        f"{distilled:,} of text alone",
        _TEXT_ALONE,
        problem=f"no sample feeds {labels(switched)}: none has a picture",
        where=f"setting {', '.join(repr(f'lambda_{name}') for name in switched)}, and {data}",
        expected="samples with pictures among those that are distilled",
    )


def has_pictures(samples: Samples, cache: Container[str] | None) -> bool:
    """Whether any of the samples that the cache has (None: of all) has a picture, as their records tell."""
    distilled = (index for index, key in enumerate(samples.keys) if cache is None or key in cache)
    return any(_has_picture(samples, index) for index in distilled)


def _has_picture(samples: Samples, index: int) -> bool:
    try:
        return samples.preview(index).images > 0
    except BadSample:  # which is met again when it is read
        return False


def embedding_rows_row(
    limits: Limits, side: ModelFiles, read: list[Encoded], name: str = "embedding rows"
) -> Row:
    """Tokens that a model has no embedding for are refused where a sample has one.

    Args:
        limits: of the models whose embeddings they are.
        side: whose tokens they are.
        read: samples as it reads them.
    """
    rows, tokens = limits.embedding_rows, len(side.processor.tokenizer)
    if rows is None or tokens <= rows:
        return Row(name, "ok", f"one for each of the {tokens:,} tokens")
    found = f"{rows:,} in {limits.embedding_rows_of} for {tokens:,} tokens: {tokens - rows:,} have none"
    for encoded in read:
        ids = encoded.inputs["input_ids"]
        is_image = ids == (-1 if side.image_token_id is None else side.image_token_id)
        try:
            limits.require_rows(ids, is_image, side.processor.tokenizer, f"sample {encoded.key!r}")
        except BadSample as error:
            return Row(name, "refused", f"{found}; {error.where}: {error.problem}", NO_ROW)
    return Row(name, "note", f"{found}; a sample with such a token is refused", NO_ROW)


def bad_rows(bad: list[BadSample], on_error: str) -> list[Row]:
    """Samples among the first that cannot be used."""
    state: State = "note" if on_error == "skip" else "refused"
    return [
        Row("bad sample", state, f"{error.where}: {error.problem}; {error.found}", error.fix) for error in bad
    ]


def answers_row(pairs: list[tuple[Encoded, Encoded]]) -> Row:
    """Whether both have the same answer tokens, wherever they stand."""
    for theirs, ours in pairs:
        if theirs.token_ids.tolist() != ours.token_ids.tolist():
            found = f"sample {ours.key!r}: {len(theirs.token_ids)} and {len(ours.token_ids)}, or other ids"
            return Row("answer tokens", "refused", found, "the same tokenizer and chat template for both")
    counts = ", ".join(str(len(ours.token_ids)) for _, ours in pairs)
    return Row("answer tokens", "ok", f"the same in {len(pairs)} sample(s): {counts}")


def image_tokens_row(teacher: ModelFiles, student: ModelFiles, pairs: list[tuple[Encoded, Encoded]]) -> Row:
    """How many places an image takes on each side; targets belong to answer tokens, so they may differ."""

    def count(side: ModelFiles, encoded: Encoded) -> int:
        return int((encoded.inputs["input_ids"] == side.image_token_id).sum()) if side.image_token_id else 0

    counts = [(count(teacher, theirs), count(student, ours)) for theirs, ours in pairs]
    found = ", ".join(str(ours) if theirs == ours else f"{theirs} and {ours}" for theirs, ours in counts)
    if all(theirs == ours for theirs, ours in counts):
        return Row("image tokens", "ok", f"{found} a sample, on both sides")
    return Row("image tokens", "note", f"{found} a sample", "no matter for L_Align; for L_VSD see 'switch'")


def pixels_row(teacher: ModelFiles, student: ModelFiles, pairs: list[tuple[Encoded, Encoded]]) -> Row:
    """Whether V_T and V_S see the same picture."""
    name = "image processing"
    if student.image_token_id is None or teacher.image_token_id is None:
        return Row(name, "note", "no vision encoder on one side or both", WITHOUT_SWITCH)
    seen = [
        (theirs.inputs["pixel_values"], ours.inputs["pixel_values"])
        for theirs, ours in pairs
        if "pixel_values" in theirs.inputs and "pixel_values" in ours.inputs
    ]
    same = all(a.shape == b.shape and torch.equal(a, b) for a, b in seen)
    if teacher.image_processing == student.image_processing:
        return Row(name, "ok", f"the same settings, {len(seen)} sample(s) with the same pixels")
    if seen and same:
        return Row(name, "ok", f"other settings, but the same pixels in {len(seen)} sample(s)")
    found = "other settings" + (
        f": pixels {tuple(seen[0][0].shape)} and {tuple(seen[0][1].shape)}" if seen else ""
    )
    fix = f"{_INTENDED}: the cache holds what the teacher saw, and V_S gets the student's own pixels"
    return Row(name, "note", found, fix)
