"""What every data set is to the rest of cachekd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cachekd.samples.sample import Sample

if TYPE_CHECKING:
    from cachekd.samples.outline import Outline


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

    def outline(self, index: int) -> Outline:
        """A sample's text and number of images, without opening one.

        Raises:
            BadSample: its record cannot be read.
            CachekdError: the data set cannot be read.
        """
        ...
