"""Hidden states that a shard's writer remembers, to compare what is read back with the live teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cachekd.cache.fidelity import measure_fidelity
from cachekd.cache.manifest import Fidelity, Header
from cachekd.cache.output_head import OutputHead
from cachekd.cache.records import TailStates, TokenTargets
from cachekd.cache.shard import read_shard
from cachekd.cache.sketch import TailSketch
from cachekd.cache.targets import CachedTargets

MOST = 64  # tokens, evenly spread over the shard


class Probes:
    """A sample of a shard's tokens: one in 1, 2, 4, ... as the shard grows."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Tensor]] = []  # token, hidden state [d]
        self._seen, self._stride = 0, 1

    def offer(self, first: int, states: TailStates) -> None:
        """Remember some of a sample's tokens; its first one is token `first` of the shard."""
        for token in range(-self._seen % self._stride, len(states), self._stride):
            self._kept.append((first + token, states.hidden[token].cpu().clone()))
        self._seen += len(states)
        while len(self._kept) > MOST:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def measure(
        self,
        path: Path,
        sha256: str,
        header: Header,
        head: OutputHead,
        sketch: TailSketch | None,
    ) -> Fidelity | None:
        """Read the tokens back from the disk, and compare them with the head's logits.

        Args:
            path, sha256: of the shard.

        Returns:
            None where no state was offered.
        """
        if not self._kept:
            return None
        shard = read_shard(path, header.codec.logprob_step, sketch=sketch is not None, sha256=sha256)
        hidden = torch.stack([state for _, state in self._kept])
        kept = TokenTargets.concatenate([shard.targets.cut(token, token + 1) for token, _ in self._kept])
        targets = CachedTargets.under(header, kept, sketch)
        return measure_fidelity(head.logits(hidden.to(head.weight.device)).cpu(), targets)
