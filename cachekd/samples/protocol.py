"""What every data set is to the rest of cachekd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cachekd.samples.sample import Sample

if TYPE_CHECKING:
    from cachekd.samples.outline import Outline


@dataclass(frozen=True)
class DataNotes:
    """What was noticed of a whole data set when it was opened, before any limit.

    Attributes:
        repeated_keys: samples whose key came before, so that theirs has `#2`, `#3`, ... behind it.
        other_files: files that are no data, such as a Mac's `._x`.
    """

    repeated_keys: int = 0
    other_files: tuple[str, ...] = ()


class Samples(Protocol):
    """A map-style data set whose keys are known before anything is read; it can be pickled.

    Attributes:
        keys: all different, in the data set's order.
        notes: what was noticed when it was opened.
    """

    keys: list[str]
    notes: DataNotes

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
