"""The terms of one batch, and their means since the last entry of the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from cachekd.losses.terms import TERMS


class BatchTerms(NamedTuple):
    """The terms of one batch, and over how many answer tokens each is.

    Attributes:
        terms: by their names in `TERMS`, those that are on, each summed over answer tokens; scalars.
        right: int64 scalar, answer tokens whose argmax is right; None unless an evaluation asks.
        tokens: the student's answer tokens.
        counts: over how many answer tokens each term is, whether or not it is computed here: a taught one
            over those that have the teacher's targets; across tokenizers those are the aligned ones, or, of
            the switched path, the teacher's own.
        divisors: what the loss divides each sum by, were this batch a whole optimizer step. Where both sides
            read text alike that is `tokens`, of taught terms too.
    """

    terms: dict[str, Tensor]
    right: Tensor | None
    tokens: int
    counts: dict[str, int]
    divisors: dict[str, int]


def term_tokens(divisors: Iterable[Mapping[str, int]]) -> Tensor:
    """[T] int64: what the sums of several batches are divided by, in the order of `TERMS`."""
    rows = [[0] * len(TERMS), *([each[name] for name in TERMS] for each in divisors)]
    return torch.tensor(rows).sum(0)


def each_divided(terms: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Add terms up, each divided by its own number of answer tokens, of `term_tokens`."""
    divisors = dict(zip(TERMS, tokens.unbind(), strict=True))
    return torch.stack([term / divisors[name] for name, term in terms.items()]).sum()


class TermSums:
    """What was computed since the last look, on the device: a look at each batch would wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(TERMS), 2, dtype=torch.float64, device=device)  # and of how many tokens

    def add(self, found: BatchTerms) -> None:
        """Add one batch more."""
        for row, name in enumerate(TERMS):
            if name in found.terms:
                self._sums[row, 0] += found.terms[name].detach()
                self._sums[row, 1] += found.counts[name]

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Each term's mean per answer token since the last look, over all processes, each of which has to
        look; without those of which nothing was computed."""
        rows = accelerator.reduce(self._sums).tolist()
        self._sums.zero_()
        return {name: total / tokens for name, (total, tokens) in zip(TERMS, rows, strict=True) if tokens}
