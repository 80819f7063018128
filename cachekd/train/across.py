"""Teacher and student with different tokenizers: both vocabularies, and where answers are aligned."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from cachekd.cache import LogitCache
from cachekd.check.data import RunModels
from cachekd.check.vocabulary import cut_to, vocabulary_of_cache
from cachekd.config import TrainConfig
from cachekd.data import Encoded
from cachekd.errors import CachekdError
from cachekd.losses.terms import TERMS, WITHOUT_SWITCH, labels
from cachekd.models import ModelFiles
from cachekd.train.alignment import AlignedShare
from cachekd.vocabulary import Alignment, TokenBytes
from cachekd.vocabulary.pair import VocabularyPair

log = logging.getLogger(__name__)

NOTHING = Alignment(rows={}, common=0, one_to_one=0, differs=None)


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

    def summary(self, found: AlignedShare | None) -> dict[str, Any]:
        """What a run's JSON says of it.

        Args:
            found: None where nothing was to be aligned.
        """
        if self.pair is None or found is None:
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
        found, expected = (
            0 if token is None else int((side.inputs["input_ids"] == token).sum().item())
            for side, token in zip((ours, theirs), tokens, strict=True)
        )
        if self.same_places and found != expected:
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
    student = models.student
    ours = cut_to(student.token_bytes, student.config.get_text_config().vocab_size)
    return AcrossTokenizers(VocabularyPair.of(_teachers(config, models, cache), ours, kind), same_places)


def _teachers(config: TrainConfig, models: RunModels, cache: LogitCache | None) -> TokenBytes:
    """What the teacher's token ids stand for, those that have a logprob."""
    if cache is None:
        assert models.teacher is not None  # live
        rows = models.teacher.config.get_text_config().vocab_size
        return cut_to(models.teacher.token_bytes, min(len(models.teacher.processor.tokenizer), rows))
    others = [] if config.teacher is None else [models.teacher or ModelFiles(config.teacher)]
    fix = "--teacher with the model folder or hub name: of it the tokenizer alone is read; or dump again"
    return vocabulary_of_cache(cache, others, fix=fix)


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
    kind = "cells of strings that both have" if config.align_vocabulary == "exact" else "cells of tokens"
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
