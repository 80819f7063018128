"""The entropy of the distributions that a cache rebuilds."""

from __future__ import annotations

import torch
from torch import Tensor

from cachekd.cache.targets import CachedTargets, UniformTail

BLOCK = 2**24  # logprobs that are rebuilt at a time: 64 MB


def entropy(targets: CachedTargets) -> Tensor:
    """[N] float64, nats, of the rebuilt distributions; with a tail sketch at the price of rebuilding them."""
    if isinstance(targets.tail, UniformTail):
        return entropy_bounds(targets)[1]
    parts = [entropy_of(targets.select(rows).everywhere()) for rows in rows_of(targets)]
    return torch.cat(parts).double() if parts else torch.empty(0, dtype=torch.float64)


def entropy_bounds(targets: CachedTargets) -> tuple[Tensor, Tensor]:
    """Between what the entropy of each token's distribution lies, from the kept entries alone.

    Returns:
        [N] float64, nats, twice. Least: all that is not kept is one more id. Most: it is spread evenly, as
        `UniformTail` has it, whose entropy this is exactly.
    """
    kept = targets.logprobs.double().exp()
    beyond = (1 - kept.sum(-1)).clamp(min=0)
    least = (torch.special.entr(kept).sum(-1) + torch.special.entr(beyond)).clamp(min=0)
    others = (targets.vocab_size - targets.k).clamp(min=1).double()
    return least, least + beyond * others.log()


def entropy_of(logprobs: Tensor) -> Tensor:
    """[N] nats, from rebuilt logprobs [N, V], which need not be quite normalised."""
    # A row of 152 k takes one exp and two passes this way, and softmax, log and product another.
    centred = (logprobs - logprobs.amax(-1, keepdim=True)).clamp_(min=-1e4)  # -inf times 0 is not 0
    weights = centred.exp()
    mass = weights.sum(-1)
    return mass.log() - torch.einsum("nv,nv->n", weights, centred) / mass


def rows_of(targets: CachedTargets) -> tuple[Tensor, ...]:
    """All tokens' indices, in runs whose logprobs over the whole vocabulary fit into memory."""
    return torch.arange(len(targets)).split(max(1, BLOCK // targets.vocab_size))
