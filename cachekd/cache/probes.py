"""Hidden states that a writer remembers, to compare what is read back with the live teacher."""

from __future__ import annotations

from itertools import groupby
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

MOST = 256  # tokens, evenly spread over the whole cache


class Probes:
    """A sample of a cache's tokens: one in 1, 2, 4, ... as the cache grows."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, int, Tensor]] = []  # shard, token in it, hidden state [d]
        self._seen, self._stride = 0, 1

    def offer(self, shard: int, first: int, states: TailStates | None) -> None:
        """Remember some of a sample's tokens; its first one is token `first` of the shard."""
        if states is None:
            return
        for token in range(-self._seen % self._stride, len(states), self._stride):
            self._kept.append((shard, first + token, states.hidden[token].cpu().clone()))
        self._seen += len(states)
        while len(self._kept) > MOST:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def measure(
        self,
        shards: list[Path],
        codec: CodecSettings,
        vocab_size: int,
        head: OutputHead,
        sketch: TailSketch | None,
    ) -> Fidelity | None:
        """Read the tokens back from the disk, and compare them with the head's logits.

        Args:
            shards: all shards' files, in order.

        Returns:
            None where no state was offered.
        """
        if not self._kept:
            return None
        parts = []
        for number, some in groupby(self._kept, key=lambda probe: probe[0]):
            shard = read_shard(shards[number], codec.logprob_step, sketch=sketch is not None)
            parts += [shard.targets.cut(token, token + 1) for _, token, _ in some]
        hidden = torch.stack([state for *_, state in self._kept])
        targets = CachedTargets.from_records(
            TokenTargets.concatenate(parts),
            vocab_size=vocab_size,
            window=codec.window,
            min_k=codec.min_k,
            sketch=sketch,
        )
        return measure_fidelity(head.logits(hidden.to(head.weight.device)).cpu(), targets)
