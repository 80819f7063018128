"""Teacher and student with different tokenizers: both vocabularies, and where answers are aligned."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from cachekd.atomic import commit
from cachekd.cache import LogitCache
from cachekd.check.data import RunModels
from cachekd.config import TrainConfig
from cachekd.data import Encoded
from cachekd.data.left_out import LeftOutSamples
from cachekd.errors import CachekdError
from cachekd.losses.terms import TERMS, WITHOUT_SWITCH, labels
from cachekd.models import ModelFiles
from cachekd.models.fingerprint import reads_otherwise
from cachekd.paths import is_url
from cachekd.train.batch import AlignedRows
from cachekd.vocabulary import Alignment, TokenBytes
from cachekd.vocabulary.pair import VocabularyPair

log = logging.getLogger(__name__)

NOTHING = Alignment(rows={}, common=0, one_to_one=0, differs=None)
_FILE = "cachekd_alignment.json"  # in a checkpoint


@dataclass(frozen=True)
class AcrossTokenizers:
    """What a run of two tokenizers knows, beside what a run of one does.

    Attributes:
        pair: the vocabularies, where the student's own logits are compared with the teacher's; None where
            only the switched path is, in the teacher's vocabulary.
        same_places: an image has to have as many places in the teacher's text as in the student's, since the
            switched path puts the student's visual features there.
    """

    pair: VocabularyPair | None = None
    same_places: bool = False

    def aligned(self, teacher_ids: Tensor, student_ids: Tensor, *, cut: bool) -> Alignment:
        """Where both sides have read the same bytes of a sample's answers.

        Args:
            teacher_ids, student_ids: [N_T] and [N_S] int64, the answer tokens.
            cut: the end of the answers may be left out on one side.
        """
        if self.pair is None:
            return NOTHING
        return self.pair.aligned(teacher_ids.numpy(), student_ids.numpy(), cut=cut)

    def summary(self, found: AlignedShare) -> dict[str, Any]:
        """What a run's JSON says of it."""
        if self.pair is None:
            return {"vocabularies": None, "aligned": None}
        sizes = {"teacher": len(self.pair.teacher), "student": len(self.pair.student)}
        cells = {"cells": self.pair.cells.cells, "shared_strings": self.pair.cells.shared}
        return {"vocabularies": sizes | cells, "aligned": asdict(found) | {"share": found.share}}

    def require_places(self, ours: Encoded, theirs: Encoded, tokens: tuple[int | None, int | None]) -> None:
        """Refuse a sample whose images have other places in the teacher's text, where that matters.

        Args:
            tokens: the student's placeholder of an image, and the teacher's.

        Raises:
            CachekdError: they have; the sample is named.
        """
        if not self.same_places or None in tokens:
            return
        pairs = zip((ours, theirs), tokens, strict=True)
        found, expected = (int((side.inputs["input_ids"] == token).sum()) for side, token in pairs)
        if found != expected:
            raise CachekdError(
                "the sample's images have another number of places in the teacher's text than the student's "
                "vision encoder fills",
                where=f"sample {ours.key!r}",
                expected=f"{expected:,}, as the teacher's processor makes them",
                found=f"{found:,}",
                fix=f"give the student the teacher's preprocessor_config.json, or {WITHOUT_SWITCH}",
            )

    @property
    def largest(self) -> int:
        """Ids of the larger vocabulary; 0 where none are compared."""
        return 0 if self.pair is None else max(len(self.pair.teacher), len(self.pair.student))


def across_tokenizers(
    config: TrainConfig, models: RunModels, cache: LogitCache | None, *, across: bool
) -> AcrossTokenizers | None:
    """What is needed of both vocabularies; None where both sides read text alike.

    Args:
        across: they do not (`CheckedCache.across`).

    Raises:
        CachekdError: nothing says what the ids of the cache stand for, or a tokenizer cannot say it.
    """
    if not across:
        if config.align_vocabulary != "none" and config.aligns:
            log.warning(
                "align_vocabulary: %s changes nothing: teacher and student have the same tokens",
                config.align_vocabulary,
            )
        return None
    kind = config.align_vocabulary
    same_places = config.switches and (config.switch_bridge is None or not models.bridge_plan().other_text)
    if not config.aligns or kind == "none":
        return AcrossTokenizers(same_places=same_places)
    teacher, rows = _teachers(config, models, cache)
    student = models.student
    pair = VocabularyPair.of(
        sized(teacher, rows),
        sized(student.token_bytes, student.config.get_text_config().vocab_size),
        kind,
    )
    return AcrossTokenizers(pair, same_places)


def sized(tokens: TokenBytes, ids: int) -> TokenBytes:
    """A vocabulary of as many ids as a model has logits for: those beyond have none, and of further ones
    nothing is known."""
    contents = tokens.contents[:ids] + (b"",) * (ids - len(tokens))
    special = frozenset(number for number in tokens.special if number < ids)
    ending = tokens.end_of_turn
    return TokenBytes(contents, special, ending if ending is not None and ending < ids else None)


def _teachers(config: TrainConfig, models: RunModels, cache: LogitCache | None) -> tuple[TokenBytes, int]:
    """What the teacher's token ids stand for, and how many of them have a logprob."""
    if cache is None:
        assert models.teacher is not None  # live
        rows = models.teacher.config.get_text_config().vocab_size
        return models.teacher.token_bytes, min(len(models.teacher.processor.tokenizer), rows)
    rows = cache.manifest.teacher.vocab_size
    if cache.vocabulary is not None:
        return cache.vocabulary, rows
    for files in _who_may_say(config, models, cache):
        if not reads_otherwise(cache.manifest.fingerprints, files.fingerprints):
            return files.token_bytes, rows
    raise CachekdError(
        "the cache does not say what its token ids stand for, and the teacher's tokenizer is not at hand",
        where=str(cache.path),
        expected="a cache with the teacher's token bytes, which `cachekd dump` writes now, or its tokenizer",
        found=f"a cache of {cache.manifest.teacher.name} without them",
        fix="--teacher with the model folder or hub name: of it the tokenizer alone is read; or dump again",
    )


def _who_may_say(config: TrainConfig, models: RunModels, cache: LogitCache) -> Iterator[ModelFiles]:
    """Models whose tokenizer may be the cache's."""
    if models.teacher is not None:
        yield models.teacher
    elif config.teacher is not None:
        yield ModelFiles(config.teacher)
    name = cache.manifest.teacher.name
    if not is_url(name) and Path(name).is_dir():
        yield ModelFiles(name)


def say_how_vocabularies_meet(
    config: TrainConfig, across: AcrossTokenizers | None, cache: LogitCache | None
) -> None:
    """Log it once, before anything long."""
    if across is None:
        return
    if (pair := across.pair) is None:
        log.warning("teacher and student have different tokenizers: each reads the samples by its own")
        return
    own = labels(name for name in config.taught if TERMS[name].path == "own")
    kind = "the strings that both have" if config.align_vocabulary == "exact" else "cells of tokens"
    log.warning(
        "teacher and student have different tokenizers, of %s and %s tokens: each reads the samples by its "
        "own, and %s compares them over %s %s, where both have read the same bytes (%s strings are in both)",
        f"{len(pair.teacher):,}",
        f"{len(pair.student):,}",
        own,
        f"{pair.cells.cells:,}",
        kind,
        f"{pair.cells.shared:,}",
    )
    if cache is not None and not cache.manifest.sketches:
        log.warning(
            "%s: the cache has no tail sketch: what it does not keep counts as spread evenly, and sums over "
            "cells are not exact",
            own,
        )


@dataclass(frozen=True)
class AlignedShare:
    """How much of the answers was aligned, and which samples could not be.

    Attributes:
        tokens: the student's answer tokens of which there is a teacher, each time that they were trained on.
        aligned: of these, compared with the teacher.
        one_to_one: of these, those that are a token of the teacher's, too.
        differing: samples whose answers are other bytes for the teacher: nothing of them is aligned.
    """

    tokens: int = 0
    aligned: int = 0
    one_to_one: int = 0
    differing: LeftOutSamples = field(default_factory=LeftOutSamples)

    @property
    def share(self) -> float:
        """Aligned rows of all answer tokens."""
        return self.aligned / self.tokens if self.tokens else 0.0


class AlignmentNotes:
    """What the batches of this process said of how they were aligned."""

    def __init__(self) -> None:
        self._counts = [0, 0, 0]
        self._before = [0, 0, 0]  # a checkpoint, of all processes
        self._differing: dict[str, str] = {}

    def note(self, found: AlignedRows) -> None:
        """Take note of one batch."""
        for place, count in enumerate((found.tokens, found.count, found.one_to_one)):
            self._counts[place] += count
        self._differing |= found.differing

    def of_all(self) -> AlignedShare:
        """What all processes noted, each of which has to ask."""
        found: list[Any] = gather_object([(self._counts, self._differing)])
        each = zip(self._before, *(counts for counts, _ in found), strict=True)
        tokens, aligned, one_to_one = map(sum, each)
        self._differing = {key: why for _, some in found for key, why in some.items()} | self._differing
        return AlignedShare(tokens, aligned, one_to_one, LeftOutSamples.of(self._differing))

    def save(self, found: AlignedShare, checkpoint: Path) -> None:
        """Write what all processes noted beside the state that a run goes on from."""
        counts = [found.tokens, found.aligned, found.one_to_one]
        commit(checkpoint / _FILE, json.dumps([counts, self._differing]).encode())

    def load(self, checkpoint: Path) -> None:
        """Go on from what was noted before."""
        file = checkpoint / _FILE
        if file.exists():
            self._before, differing = json.loads(file.read_text())
            self._differing = {**differing, **self._differing}


def say_what_was_not_aligned(found: AlignedShare) -> None:
    """Log the samples whose answers differ, at the end of a run."""
    named = list(found.differing.first.items())[:5]
    if named:
        log.warning(
            "the answers of %s samples are other bytes for the teacher than for the student: nothing of them "
            "was aligned: %s",
            f"{found.differing.samples:,}",
            "; ".join(f"{key!r}: {why}" for key, why in named),
        )
