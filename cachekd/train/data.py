"""The data set that the Trainer reads: encoded samples beside what the teacher said of them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sized
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset, get_worker_info

from cachekd.cache import CachedTargets, LogitCache
from cachekd.check.match import check_content, check_sample, cut_alike
from cachekd.check.tiles import require_same_tiles
from cachekd.config.data import OnError
from cachekd.data import Encoded, SampleEncoder, Samples, rough_lengths
from cachekd.data.left_out import BadSamples, DataHealth, first_good, may_be_left_out
from cachekd.data.loader import dead_worker
from cachekd.errors import BadSample, CachekdError, without_frames
from cachekd.train.across import NOTHING, AcrossTokenizers
from cachekd.train.alignment import AlignmentNotes
from cachekd.train.batch import Batch, Example, Fault, collate_with_targets


class TrainingSamples(Dataset):
    """Samples, encoded, beside their cached targets, checked against each other.

    Args:
        samples: the data set.
        encoder: the student's.
        cache: None for plain cross-entropy and for a live teacher.
        teacher_encoder: the teacher's own, where it has another tokenizer, where a live one prepares images
            otherwise, or where an image has another number of places in its text.
        on_error: whether a bad sample stops the run, or is left out of it.
        across: that teacher and student have different tokenizers; None: both read text alike.
        same_tiles: the pictures of a sample that the teacher reads by itself must have the student's tiles.
    """

    def __init__(
        self,
        samples: Samples,
        encoder: SampleEncoder,
        cache: LogitCache | None,
        teacher_encoder: SampleEncoder | None = None,
        *,
        on_error: OnError = "stop",
        across: AcrossTokenizers | None = None,
        same_tiles: bool = False,
    ) -> None:
        self.samples, self.encoder, self.cache, self.same_tiles = samples, encoder, cache, same_tiles
        self.teacher_encoder, self.on_error, self.across = teacher_encoder, on_error, across
        self._lengths: list[int] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def uncovered(self, but: Container[str] = ()) -> int:
        """How many samples the cache lacks.

        Args:
            but: keys of samples that do not count.
        """
        if self.cache is None:
            return 0
        return sum(key not in self.cache and key not in but for key in self.samples.keys)

    def lengths(self) -> list[int]:
        """About how many tokens each sample has, without reading more than a few images; found once."""
        if self._lengths is None:
            self._lengths = rough_lengths(self.samples, self.encoder)
        return self._lengths

    def __getitem__(self, index: int) -> Example | Fault:
        """One example; a `Fault` where it is left out.

        In a worker process any fault of it is a value, which `Feed` raises: a DataLoader would wrap the
        error into its own text and traceback.
        """
        in_worker = get_worker_info() is not None
        try:
            return self._example(index)
        except CachekdError as error:
            left_out = may_be_left_out(error, self.on_error)
            if not left_out and not in_worker:
                raise
            return Fault(self.samples.keys[index], without_frames(error), left_out)

    def _example(self, index: int) -> Example:
        sample = self.samples[index]
        encoded = self.encoder(sample)
        theirs = None
        if self.teacher_encoder is not None:
            theirs = self.teacher_encoder(sample)
            if self.same_tiles:
                require_same_tiles(encoded, theirs, self.encoder, self.teacher_encoder)
        # `--missing` has decided before training whether a cache may lack samples.
        targets = None if self.cache is None or encoded.key not in self.cache else self.cache[encoded.key]
        if self.across is not None:
            return self._across(self.across, Example(encoded, targets, theirs))
        if self.encoder.limits.too_long == "cut":
            encoded, targets, theirs = _cut_alike(encoded, targets, theirs)
        if theirs is not None:
            check_answers(encoded, theirs)
        if self.cache is not None and targets is not None:
            check_sample(self.cache, encoded, targets)
        return Example(encoded, targets, theirs)

    def _across(self, across: AcrossTokenizers, read: Example) -> Example:
        """Check what the teacher read against the cache, and align its answers with the student's.

        Raises:
            CachekdError: the sample changed since the dump, or its images have other numbers of places.
        """
        encoded, targets, theirs = read.encoded, read.targets, read.for_teacher
        cut = encoded.cut or (theirs is not None and theirs.cut)
        if self.cache is not None and targets is not None:
            if self.encoder.limits.too_long == "cut":
                cut |= any(source.data.too_long == "cut" for source in self.cache.manifest.sources)
                if theirs is not None:
                    theirs, targets = cut_alike(theirs, targets)
            if theirs is not None:
                check_sample(self.cache, theirs, targets)
            else:  # nobody reads the text as the cache's teacher did
                check_content(self.cache, encoded.key, encoded.content_hash)
        if theirs is not None and self.teacher_encoder is not None:
            tokens = self.encoder.image_token_id, self.teacher_encoder.image_token_id
            across.require_places(encoded, theirs, tokens)
            if across.same_places and self.cache is not None:
                theirs = theirs.without_pictures()  # the switched path looks at the student's alone
        ids = None if targets is None else targets.token_ids
        if self.cache is None and theirs is not None:  # live
            ids = theirs.token_ids
        aligned = NOTHING if ids is None else across.aligned(ids, encoded.token_ids, cut=cut)
        return replace(read, targets=targets, for_teacher=theirs, aligned=aligned)


def _cut_alike(
    encoded: Encoded, targets: CachedTargets | None, theirs: Encoded | None
) -> tuple[Encoded, CachedTargets | None, Encoded | None]:
    """Cut all of them behind the last answer token that all have."""
    if theirs is not None:
        both = min(len(encoded.token_ids), len(theirs.token_ids))
        encoded, theirs = encoded.up_to(both), theirs.up_to(both)
    if targets is not None:
        encoded, targets = cut_alike(encoded, targets)
    return encoded, targets, None if theirs is None else theirs.up_to(len(encoded.token_ids))


def check_answers(ours: Encoded, theirs: Encoded) -> None:
    """Refuse a sample whose answer tokens are others for the teacher: positions are matched by them.

    Raises:
        CachekdError: they differ; the sample is named.
    """
    if not torch.equal(ours.token_ids, theirs.token_ids):
        raise CachekdError(
            "the answer tokens differ between student and teacher",
            where=f"sample {ours.key!r}",
            expected=f"the teacher's {len(theirs.token_ids)} tokens",
            found=f"{len(ours.token_ids)} tokens, or others",
            fix="give the student the teacher's tokenizer and chat template",
        )


class Feed:
    """A data set as batches: samples that are left out are noted, and data that have gone stop it.

    Args:
        data: of `Example` and `Fault`.
        pad_token_id: for batches.

    Attributes:
        first: the first sample that can be used.
        collate: samples to a batch, for a DataLoader.
        bad: samples that this process met and left out.
        notes: how this process's batches were aligned, across tokenizers.

    Raises:
        CachekdError: no sample can be used.
    """

    def __init__(self, data: Dataset, pad_token_id: int) -> None:
        self._data: Any = data
        self.pad_token_id = pad_token_id
        self.bad, self.notes = BadSamples(), AlignmentNotes()
        samples = len(cast(Sized, data))
        place, self.first = first_good(samples, self._read)
        self._health = DataHealth(samples, self._read)
        self._health.good(place)
        # No lambda: it goes to spawned workers.
        self.collate = partial(collate_with_targets, pad_token_id=pad_token_id, stand_in=self.first.encoded)

    def _read(self, index: int) -> Example | BadSample:
        """Reads one sample in this process, whatever workers read."""
        found: Example | Fault = self._data[index]
        if isinstance(found, Example):
            return found
        assert isinstance(found.error, BadSample)  # or it would have been raised
        self.bad.note(found.key, found.error)
        return found.error

    def batches(self, loaded: Iterator[Batch | Fault]) -> Iterator[Batch]:
        """What was loaded, by workers or not.

        Raises:
            CachekdError: what was wrong with a sample, as if it had been read here; data that have gone; or a
                worker died.
        """
        while True:
            try:
                batch = next(loaded, None)
            except RuntimeError as error:
                if (died := dead_worker(error)) is not None:
                    raise died from error
                raise
            if batch is None:
                return
            if isinstance(batch, Fault):
                raise batch.error
            for key, wrong in batch.left_out.items():
                self.bad.note(key, wrong)
            if batch.aligned is not None:
                self.notes.note(batch.aligned)
            if batch.keys:
                self._health.good()
            else:
                self._health.bad(batch.left_out.values())
            yield batch

    def all_bad(self) -> dict[str, str]:
        """Key and reason of those that were left out, in all processes, each of which has to ask."""
        self.bad.add(gather_object([self.bad.reasons]))
        return self.bad.reasons
