"""Logits that exist for a few answer tokens at a time: in a loss over hidden states, and a live teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cachekd.losses.targets import DenseTargets

# float32 bytes of the logits of one chunk. A loss holds one (DBiLD) to eleven (JSD) more arrays of that size
# at its peak: `python benchmarks/dbild.py --losses`.
CHUNK_BYTES = 2**26

Terms = dict[str, Tensor]


def chunk_tokens(vocab_size: int) -> int:
    """Answer tokens per chunk: what `CHUNK_BYTES` holds, at least one."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def at_a_time(device: torch.device) -> int:
    """Elements that are worked on together, where any number would do: what stays in a CPU's cache, and what
    a GPU is busy with."""
    return 2**21 if device.type == "cpu" else 2**28


def summed_over_chunks(loss: Callable[[Tensor, Tensor], Terms], states: Tensor, chunk: int) -> Terms:
    """Sum a loss over chunks of answer tokens, so that no [N, V] tensor exists unless it fits one chunk.

    A chunk's logits are let go after its forward and made again in its backward: one more product with the
    head, for memory that does not grow with N. Where one chunk holds all tokens, nothing is done twice.

    Args:
        loss: (states [n, d], rows [n] int64) to terms, each a sum over these n tokens; it applies the head.
        states: [N, d], what the head reads.
        chunk: the most tokens at a time.

    Returns:
        the terms summed over all N, scalars; differentiable in `states` and in whatever `loss` uses.
    """
    rows = torch.arange(len(states), device=states.device)
    if len(states) <= chunk:
        return loss(states, rows)
    totals: Terms = {}
    for some_states, some_rows in zip(states.split(chunk), rows.split(chunk), strict=True):
        terms = checkpoint(loss, some_states, some_rows, use_reentrant=False, preserve_rng_state=False)
        totals = {name: totals.get(name, 0.0) + term for name, term in terms.items()}
    return totals


@dataclass(frozen=True)
class LiveTargets:
    """A live teacher before its head: `select` gives the logits of a few tokens at a time.

    Attributes:
        token_ids: [N] int64, the answer tokens.
        states: [N, d], what the teacher's head reads.
        logits_of: the head, [n, d] to [n, V].
        vocab_size: logits beyond it belong to no token.
    """

    token_ids: Tensor
    states: Tensor
    logits_of: Callable[[Tensor], Tensor]
    vocab_size: int

    def __len__(self) -> int:
        return len(self.token_ids)

    def part(self, rows: Tensor) -> LiveTargets:
        """Keep some tokens, by their indices [M] int64; still no logits exist."""
        return replace(self, token_ids=self.token_ids[rows], states=self.states[rows])

    @torch.no_grad()
    def select(self, rows: Tensor) -> DenseTargets:
        """Select tokens by their indices [M] int64."""
        logits = self.logits_of(self.states[rows])[:, : self.vocab_size]
        return DenseTargets(logits, self.token_ids[rows])
