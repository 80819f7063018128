"""`--limit` and `--shuffle-seed`: a part of a data set, in another order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cachekd.samples.outline import Outline
from cachekd.samples.protocol import Samples
from cachekd.samples.sample import Sample


class SamplesView:
    """The first `limit` samples of a data set after shuffling; its keys are in its own order.

    Args:
        samples: the data set.
        limit: how many at most; None: all.
        shuffle_seed: of the permutation; None: the data set's own order.
        only: indices, of which the others are left out beforehand; None: all.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        order = np.arange(len(samples)) if only is None else np.array(only)
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        self._samples, self._order = samples, order[:limit].copy()
        self.keys = [samples.keys[index] for index in self._order]
        self.notes = samples.notes

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample; raises what the data set does."""
        return self._samples[int(self._order[index])]

    def outline(self, index: int) -> Outline:
        """See `Samples.outline`."""
        return self._samples.outline(int(self._order[index]))
