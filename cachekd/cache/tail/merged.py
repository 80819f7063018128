"""The tail of tokens of several sketches, as a merged cache has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachekd.cache.tail.sketch import SketchTail


@dataclass(frozen=True)
class MergedTail:
    """N tokens of several sketches.

    Attributes:
        parts: the tokens of each sketch.
        part: [N] int64, which of them a token is in.
        place: [N] int64, and where.
    """

    parts: tuple[SketchTail, ...]
    part: Tensor
    place: Tensor

    def gather(self, ids: Tensor) -> Tensor:
        """Rebuild logprobs [N, K] float32 at `ids` [N, K]."""
        return self._filled(ids.shape[1], lambda tail, rows: tail.gather(ids[rows]))

    def everywhere(self, vocab_size: int) -> Tensor:
        """Rebuild all logprobs [N, V] float32."""
        return self._filled(vocab_size, lambda tail, _rows: tail.everywhere(vocab_size))

    def _filled(self, width: int, rebuild: Callable[[SketchTail, Tensor], Tensor]) -> Tensor:
        found = torch.empty(len(self.part), width, device=self.part.device)
        for number, part in enumerate(self.parts):
            rows = (self.part == number).nonzero()[:, 0]
            found[rows] = rebuild(part.select(self.place[rows]), rows)
        return found

    def select(self, rows: Tensor) -> MergedTail:
        """Take some tokens."""
        return replace(self, part=self.part[rows], place=self.place[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MergedTail:
        """Copy it to `device`."""
        return MergedTail(
            tuple(part.to(device, non_blocking=non_blocking) for part in self.parts),
            self.part.to(device, non_blocking=non_blocking),
            self.place.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> MergedTail:
        """Copy it to page-locked memory."""
        parts = tuple(part.pin_memory() for part in self.parts)
        return MergedTail(parts, self.part.pin_memory(), self.place.pin_memory())


def join_sketch_tails(tails: Sequence[SketchTail | MergedTail]) -> SketchTail | MergedTail:
    """Join the tails' tokens, one after the other; merged only where there is more than one sketch."""
    by_sketch: dict[str | int, list[SketchTail]] = {}
    parts, places = [], []
    for tail in tails:
        pieces = tail.parts if isinstance(tail, MergedTail) else (tail,)
        numbers, starts = [], []
        for piece in pieces:
            # A sketch that was read twice is the same one.
            name = piece.sketch.sha256 or id(piece.sketch)
            same = by_sketch.setdefault(name, [])
            numbers.append(list(by_sketch).index(name))
            starts.append(sum(len(other.shift) for other in same))
            same.append(piece)
        if isinstance(tail, MergedTail):
            part, place = tail.part, tail.place
        else:
            part = torch.zeros(len(tail.shift), dtype=torch.long, device=tail.shift.device)
            place = torch.arange(len(tail.shift), device=tail.shift.device)
        parts.append(torch.tensor(numbers, device=part.device)[part])
        places.append(torch.tensor(starts, device=part.device)[part] + place)
    joined = tuple(same[0].cat(same[1:]) for same in by_sketch.values())
    if len(joined) > 1:
        return MergedTail(joined, torch.cat(parts), torch.cat(places))
    if any(isinstance(tail, MergedTail) for tail in tails):  # whose tokens need not lie in order
        return joined[0].select(torch.cat(places))
    return joined[0]
