"""What every data set is to the rest of cachekd."""

from __future__ import annotations

from typing import Protocol

from cachekd.samples.sample import Sample


class Samples(Protocol):
    """A map-style data set whose keys are known before anything is read; it can be pickled."""

    keys: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            BadSample: this one cannot be used.
            CachekdError: the data set cannot be read.
        """
        ...
