"""Hidden states that a writer remembers, to compare what is read back with the live teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cachekd.cache.fidelity import measure_fidelity
from cachekd.cache.fit import OutputHead
from cachekd.cache.manifest import CodecSettings, Fidelity
from cachekd.cache.records import TailStates, TokenTargets
from cachekd.cache.shard import read_shard
from cachekd.cache.sketch import TailSketch
from cachekd.cache.targets import CachedTargets

MOST, STRIDE = 128, 61  # tokens per shard, one in so many


class Probes:
    """A sample of the tokens of the first and of the latest shard."""

    def __init__(self) -> None:
        self._states: dict[int, list[tuple[int, Tensor]]] = {}  # shard -> token in it, hidden state [d]

    def offer(self, shard: int, first: int, states: TailStates | None) -> None:
        """Remember some of a sample's tokens; its first one is token `first` of the shard."""
        if states is None:
            return
        if shard not in self._states:
            self._states = {number: kept for number, kept in self._states.items() if number == 0}
        kept = self._states.setdefault(shard, [])
        for token, hidden in enumerate(states.hidden, first):
            if len(kept) < MOST and token % STRIDE == 0:
                kept.append((token, hidden.cpu().clone()))

    def measure(
        self,
        shards: list[Path],
        codec: CodecSettings,
        vocab_size: int,
        head: OutputHead | None,
        sketch: TailSketch | None,
    ) -> Fidelity | None:
        """Read the tokens back from the disk, and compare them with the head's logits.

        Args:
            shards: all shards' files, in order.

        Returns:
            None where there is no head, or no state was offered.
        """
        if head is None or not self._states:
            return None
        parts, hidden = [], []
        for number, kept in sorted(self._states.items()):
            shard = read_shard(shards[number], codec.logprob_step, sketch=sketch is not None)
            parts += [shard.targets.cut(token, token + 1) for token, _ in kept]
            hidden += [state for _, state in kept]
        targets = CachedTargets.from_records(
            TokenTargets.concatenate(parts),
            vocab_size=vocab_size,
            window=codec.window,
            min_k=codec.min_k,
            sketch=sketch,
        )
        return measure_fidelity(head.logits(torch.stack(hidden).to(head.weight.device)).cpu(), targets)
