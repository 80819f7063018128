"""How samples are cut into batches: by their padded tokens, by their number, or by both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

# More padded tokens than that keep no GPU busier; a group of batches waits in main memory.
MOST_TOKENS = 16_384

log = logging.getLogger(__name__)


def tokens_like(samples: int, longest: int) -> int:
    """The padded tokens of so many of the longest samples, up to MOST_TOKENS; at least one of them."""
    return max(longest, min(samples * longest, MOST_TOKENS))


@dataclass(frozen=True)
class BatchLimits:
    """What one batch holds at most. A sample that is longer than `tokens` is a batch of its own.

    Attributes:
        samples: None: any number.
        tokens: padding included, so samples times the longest of them; None: any number.
    """

    samples: int | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        said = [] if self.tokens is None else [f"{self.tokens:,} padded tokens"]
        said += [] if self.samples is None else [f"{self.samples:,} samples"]
        return f"at most {' and '.join(said)} per forward"

    def hold(self, samples: int, longest: int) -> bool:
        """Whether a batch may have so many samples, of which the longest has so many tokens."""
        few = self.samples is None or samples <= self.samples
        return few and (self.tokens is None or samples * longest <= self.tokens)

    def filled_by(self, samples: int, tokens: int) -> bool:
        """Whether a batch, or more, can be made of so many samples with so many tokens in all."""
        by_number = self.samples is not None and samples >= self.samples
        return by_number or (self.tokens is not None and tokens >= self.tokens)

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Cut samples, sorted by length, into batches, each as full as it may be.

        Args:
            lengths: of each sample, tokens.

        Returns:
            Places in `lengths`, each once.
        """
        batches: list[list[int]] = []
        for place in sorted(range(len(lengths)), key=lengths.__getitem__):
            if not batches or not self.hold(len(batches[-1]) + 1, lengths[place]):
                batches.append([])
            batches[-1].append(place)
        return batches

    def below(self, samples: int, longest: int) -> BatchLimits:
        """Limits that a batch twice as large as they allow did not fit: half of its tokens, or of its
        samples where these alone are limited."""
        if self.tokens is None:
            return replace(self, samples=max(1, samples // 2))
        return replace(self, tokens=max(1, samples * longest // 2))

    def say_what_runs_alone(self, longest: int) -> None:
        """Log it, once, where the longest sample is by itself beyond the tokens of a batch."""
        if self.tokens is not None and longest > self.tokens:
            _say_what_runs_alone(self.tokens)


def limits_said(samples: int | None, tokens: int | None) -> BatchLimits | None:
    """The limits that settings name; None where they leave them to what is measured."""
    return None if samples is None and tokens is None else BatchLimits(samples, tokens)


@cache
def _say_what_runs_alone(tokens: int) -> None:
    log.warning("a sample that has more tokens than a batch is to have, %s, runs alone", f"{tokens:,}")
