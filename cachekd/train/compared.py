"""Which of a batch's answer tokens are compared with the teacher, and how many each term's sum is of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cachekd.cache import CachedTargets
from cachekd.losses.cells import Cells, OverCells
from cachekd.losses.chunked import LiveTargets
from cachekd.losses.terms import TERMS
from cachekd.train.across import AcrossTokenizers
from cachekd.train.batch import Batch
from cachekd.vocabulary import Lead, VocabularyPair

Targets = CachedTargets | LiveTargets


class Part(NamedTuple):
    """Some of the student's answer tokens.

    Attributes:
        rows: which they are, [n] int64 or [N] bool; None: all.
        targets: the teacher at them; None: there is none, or nothing is compared.
    """

    rows: Tensor | None
    targets: Targets | OverCells | None


class ComparedTokens:
    """Takes a batch's answer tokens apart.

    Args:
        across: that teacher and student have different tokenizers; None: both read text alike.
    """

    def __init__(self, across: AcrossTokenizers | None) -> None:
        self._across = across
        self._cells: dict[tuple[Lead, torch.device], Cells] = {}

    def parts(self, batch: Batch, targets: Targets | None, *, compares: bool) -> list[Part]:
        """The student's answer tokens by what they are compared with.

        Args:
            targets: the teacher at the answer tokens that it has something to say of.
            compares: whether a term compares the student's own logits with the teacher's.
        """
        if self._across is None:
            if targets is None or batch.covered is None:
                return [Part(None, targets)]
            return [Part(batch.covered, targets), Part(~batch.covered, None)]
        pair, aligned = self._across.pair, batch.aligned
        if targets is None or aligned is None or pair is None or not compares or not aligned.rows:
            return [Part(None, None)]
        parts = []
        for lead, (theirs, ours) in aligned.rows.items():
            some = targets.part(theirs) if isinstance(targets, LiveTargets) else targets.select(theirs)
            parts.append(Part(ours, OverCells(some, self._cells_after(pair, lead, ours.device))))
        return [*parts, Part(aligned.rest, None)] if len(aligned.rest) else parts

    def counts(self, batch: Batch, targets: Targets | None, tokens: int) -> dict[str, int]:
        """See `BatchTerms.counts`.

        Args:
            tokens: the student's answer tokens.
        """
        taught = 0 if targets is None else len(targets)
        own = taught
        if self._across is not None:
            own = 0 if targets is None or batch.aligned is None else batch.aligned.count
        return {
            name: tokens if not term.taught else own if term.path == "own" else taught
            for name, term in TERMS.items()
        }

    def divisors(self, batch: Batch, tokens: int) -> dict[str, int]:
        """See `BatchTerms.divisors`."""
        if self._across is None:
            return dict.fromkeys(TERMS, tokens)
        return dict.fromkeys(TERMS, 0) if batch.aligned is None else batch.aligned.divisors

    def _cells_after(self, pair: VocabularyPair, lead: Lead, device: torch.device) -> Cells:
        """Both vocabularies' cells on a device, laid out once."""
        if (lead, device) not in self._cells:
            self._cells[lead, device] = Cells.of(pair.cells_after(lead)).to(device)
        return self._cells[lead, device]
