"""What the Trainer reads: encoded samples beside what the teacher said of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from cachekd.cache import CachedTargets, LogitCache
from cachekd.errors import CachekdError
from cachekd.matching import check_sample
from cachekd.samples import Encoded, SampleEncoder, Samples, collate, rough_lengths
from cachekd.samples.reader import dead_worker, quiet_tokenizers

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One sample to train on.

    Attributes:
        encoded: for the student.
        targets: the cached teacher; None without a cache, or for a sample that the cache lacks.
        for_teacher: the same sample as the teacher reads it, live or behind a bridge; None where it reads
            what the student reads.
    """

    encoded: Encoded
    targets: CachedTargets | None = None
    for_teacher: Encoded | None = None


class TrainingSamples(Dataset):
    """Samples, encoded, beside their cached targets, checked against each other.

    Args:
        samples: the data set.
        encoder: the student's.
        cache: None for plain cross-entropy and for a live teacher.
        teacher_encoder: the teacher's own, where a live one prepares images in another way, or where an image
            has another number of places in its text.
    """

    def __init__(
        self,
        samples: Samples,
        encoder: SampleEncoder,
        cache: LogitCache | None,
        teacher_encoder: SampleEncoder | None = None,
    ) -> None:
        self.samples, self.encoder, self.cache = samples, encoder, cache
        self.teacher_encoder = teacher_encoder

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def uncovered(self) -> int:
        """Samples that the cache lacks."""
        return 0 if self.cache is None else sum(key not in self.cache for key in self.samples.keys)

    def lengths(self) -> list[int]:
        """About how many tokens each sample has, without reading more than a few images."""
        return rough_lengths(self.samples, self.encoder)

    def __getitem__(self, index: int) -> Example | CachekdError:
        """One example. In a worker process a fault of it is a value, which `checked` raises: a DataLoader
        would wrap the error into its own text and traceback."""
        if get_worker_info() is None:
            return self._example(index)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the step's batches still come
        try:
            return self._example(index)
        except CachekdError as error:
            error.__cause__ = error.__context__ = None  # their frames hold images, and cannot be pickled
            return error.with_traceback(None)

    def _example(self, index: int) -> Example:
        sample = self.samples[index]
        encoded = self.encoder(sample)
        theirs = None if self.teacher_encoder is None else self.teacher_encoder(sample)
        if theirs is not None:
            check_answers(encoded, theirs)
        # `--missing` has decided before training whether a cache may lack samples.
        if self.cache is None or encoded.key not in self.cache:
            return Example(encoded, for_teacher=theirs)
        targets = self.cache[encoded.key]
        check_sample(self.cache, encoded, targets)
        return Example(encoded, targets, theirs)


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


def checked(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same batches, from workers or not.

    Raises:
        CachekdError: what was wrong with a sample, as if it had been read here; or a worker died.
    """
    while True:
        try:
            with quiet_tokenizers():  # the first batch starts the workers
                batch = next(batches, None)
        except RuntimeError as error:
            if (died := dead_worker(error)) is not None:
                raise died from error
            raise
        if batch is None:
            return
        if "error" in batch:
            raise batch["error"]
        yield batch


def collate_with_targets(examples: list[Example | CachekdError], pad_token_id: int) -> dict[str, Any]:
    """One batch of the Trainer.

    Returns:
        the model's inputs; `labels` [B, S] int64 for the Trainer to count, -100 where nothing is predicted;
        `keys` of the samples. With targets: `targets` of all samples that have some, and, where not all
        have, `covered` [N] bool, which of the answer tokens these are. For a teacher with inputs of its own:
        `for_teacher`, these with `supervised` [B, S'] bool. Where a worker met a fault: `error`, the first
        one, alone.
    """
    faults = [example for example in examples if isinstance(example, CachekdError)]
    if faults:
        return {"error": faults[0]}
    return _batch([example for example in examples if isinstance(example, Example)], pad_token_id)


def _batch(examples: list[Example], pad_token_id: int) -> dict[str, Any]:
    batch: dict[str, Any] = collate([example.encoded for example in examples], pad_token_id)
    supervised: Tensor = batch.pop("supervised")
    batch["labels"] = batch["input_ids"].masked_fill(~supervised, IGNORE)
    batch["keys"] = [example.encoded.key for example in examples]
    targets = [example.targets for example in examples]
    if any(target is not None for target in targets):
        batch["targets"] = CachedTargets.cat([target for target in targets if target is not None])
        if any(target is None for target in targets):
            has_targets = torch.tensor([target is not None for target in targets])
            batch["covered"] = has_targets.repeat_interleave(supervised.sum(1))
    others = [example.for_teacher for example in examples if example.for_teacher is not None]
    if others:
        batch["for_teacher"] = collate(others, pad_token_id)
    return batch
