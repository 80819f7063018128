"""Places that are evenly spread, however many of them are looked at."""

from __future__ import annotations

from collections.abc import Iterator

GOLDEN_RATIO = (5**0.5 - 1) / 2


def spread(count: int) -> Iterator[int]:
    """0 to count - 1, each once, at any time evenly spread."""
    seen = set()
    for turn in range(20 * count):
        number = int(turn * GOLDEN_RATIO % 1 * count)
        if number not in seen:
            seen.add(number)
            yield number
    yield from (number for number in range(count) if number not in seen)


def evenly(batches: list, wanted: int, turn: int) -> list:
    """`wanted` of the batches, short and long ones alike, others at every turn."""
    offset = turn * GOLDEN_RATIO % 1
    return [batches[int((place + offset) * len(batches) / wanted)] for place in range(wanted)]
