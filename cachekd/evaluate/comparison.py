"""A model beside the teacher: token by token, or over cells where the answers are other tokens for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from cachekd.check.vocabulary import cut_to
from cachekd.evaluate.questions import AskedSample
from cachekd.evaluate.reference import Reference
from cachekd.losses import chunk_tokens, forward_kl_loss
from cachekd.losses.cells import Cells
from cachekd.models import ModelFiles
from cachekd.models.fingerprint import tokenizer_fingerprint
from cachekd.vocabulary import Alignment, Lead, VocabularyPair


@dataclass(frozen=True)
class Target:
    """What a question's answer is compared with.

    Attributes:
        teacher: the reference's part.
        alignment: which of its tokens stand beside which of the model's; None: they are the same.
    """

    teacher: Any
    alignment: Alignment | None = None

    @property
    def over_cells(self) -> bool:
        """Whether the two are compared over cells; or not at all, as their bytes differ."""
        return self.alignment is not None

    @property
    def differs(self) -> str | None:
        """Why nothing is compared; None where something is."""
        return None if self.alignment is None else self.alignment.differs


class Compared(NamedTuple):
    """At each of N answer tokens of a model.

    Attributes:
        there: [N] bool, whether it is compared.
        agreed: [N] bool, whether model and teacher prefer the same; False where it is not compared.
        divergence: [N] float64, KL(teacher || model) in nats; 0 where it is not.
    """

    there: Tensor
    agreed: Tensor
    divergence: Tensor

    @classmethod
    def nothing(cls, logits: Tensor) -> Self:
        """At none of the tokens of logits [N, V]."""
        nothing = torch.zeros(len(logits), device=logits.device, dtype=torch.float64)
        return cls(nothing.bool(), nothing.bool(), nothing)


class Comparison:
    """One model beside the teacher.

    Where an answer is the same tokens for both, these are compared. Else (another tokenizer, or another chat
    template's end of an answer) the two are compared at the places where both have read the same bytes, over
    cells: classes of tokens that both can say (`cachekd.vocabulary`). There, both
    distributions are normalised over the cells.

    Args:
        reference: the teacher.
        model: its files.
    """

    def __init__(self, reference: Reference, model: ModelFiles) -> None:
        self.reference, self._model = reference, model
        self._cells: dict[Lead, Cells] = {}

    @cached_property
    def _has_teachers_tokenizer(self) -> bool:
        return self.reference.tokenizer == tokenizer_fingerprint(self._model.processor.tokenizer)

    @cached_property
    def _pair(self) -> VocabularyPair:
        rows = self._model.config.get_text_config().vocab_size
        ours = cut_to(self._model.token_bytes, min(len(self._model.processor.tokenizer), rows))
        return VocabularyPair.of(self.reference.vocabulary, ours, "cells")

    def of(self, sample: AskedSample) -> list[Target]:
        """What each of a sample's questions is compared with. A sample that the reference lacks is never
        asked about.

        Raises:
            CachekdError: it is another sample than the teacher's.
        """
        if self._has_teachers_tokenizer and (same := self.reference.of_same_tokens(sample)) is not None:
            return [Target(part) for part in same]
        parts = self.reference.of(sample)
        if parts is None:
            unknown = Alignment({}, 0, 0, "the teacher's answers in the cache cannot be told apart")
            return [Target(None, unknown)] * len(sample.encoded)
        return [
            Target(part, self._pair.aligned(part.token_ids.numpy(), question.token_ids.numpy()))
            for question, part in zip(sample.encoded, parts, strict=True)
        ]

    def __call__(
        self, targets: Sequence[Target], logits: Tensor, preferred: Tensor, counts: Sequence[int]
    ) -> Compared:
        """Compare the model's N answer tokens of some questions with the teacher's.

        Args:
            targets: of each question.
            logits: [N, V] float32, the model's.
            preferred: [N] int64, its most probable tokens.
            counts: how many of the N tokens each question has.
        """
        if not any(one.over_cells for one in targets):
            return self._token_by_token(targets, logits, preferred)
        found = Compared.nothing(logits)
        spans = [
            torch.arange(end - count, end, device=logits.device)
            for end, count in zip(accumulate(counts), counts, strict=True)
        ]
        plain = [place for place, one in enumerate(targets) if not one.over_cells]
        if plain:
            rows = torch.cat([spans[place] for place in plain])
            same = self._token_by_token([targets[place] for place in plain], logits[rows], preferred[rows])
            for values, some in zip(found, same, strict=True):
                values[rows] = some
        for lead in dict.fromkeys(lead for one in targets if one.alignment for lead in one.alignment.rows):
            self._over_cells(lead, targets, spans, logits, found)
        return found

    def _token_by_token(self, targets: Sequence[Target], logits: Tensor, preferred: Tensor) -> Compared:
        theirs, best = self.reference.joined([one.teacher for one in targets])
        theirs, best = theirs.to(logits.device), best.to(logits.device)
        divergence = forward_kl_loss(logits[:, : theirs.vocab_size], theirs, reduction="none")
        agreed = preferred == best
        return Compared(torch.ones_like(agreed), agreed, divergence.double())

    def _over_cells(
        self,
        lead: Lead,
        targets: Sequence[Target],
        spans: Sequence[Tensor],
        logits: Tensor,
        found: Compared,
    ) -> None:
        """Fill in the rows of one lead."""
        parts, teachers, models, before = [], [], [], 0
        for one, span in zip(targets, spans, strict=True):
            if one.alignment is not None and lead in one.alignment.rows:
                theirs, ours = map(torch.from_numpy, one.alignment.rows[lead])
                parts.append(one.teacher)
                teachers.append(theirs + before)
                models.append(span[ours.to(span.device)])
                before += len(one.teacher.token_ids)
        base, rows, device = self.reference.at(parts, torch.cat(teachers)), torch.cat(models), logits.device
        if lead not in self._cells:
            self._cells[lead] = Cells.of(self._pair.cells_after(lead)).to(device)
        cells = self._cells[lead]
        ids = max(logits.shape[1], len(self._pair.teacher))  # of the larger vocabulary
        for some in torch.arange(len(rows)).split(chunk_tokens(ids)):
            teacher = cells.of_teacher(base.select(some.to(base.token_ids.device)).to(device))
            model = cells.of_student(logits[rows[some.to(device)]])
            at = rows[some.to(device)]
            found.there[at] = True
            found.agreed[at] = model.argmax(-1) == teacher.everywhere().argmax(-1)
            found.divergence[at] = forward_kl_loss(model, teacher, reduction="none").double()
