"""Samples that are left out, and why; told from data that have gone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

from cachekd.atomic import commit
from cachekd.data.spread import spread
from cachekd.errors import BadSample, CachekdError, LeftOut, without_frames

log = logging.getLogger(__name__)

NAMED = 100  # samples in a record; all are counted
_FILE = "cachekd_left_out.json"  # in a checkpoint
_LOGGED = 10  # a line each; what follows is counted
T = TypeVar("T")
# A data folder that has gone makes every sample bad. So many in a row are reason to look whether it is there.
IN_A_ROW = 16
# In vain before nothing was good. That many take seconds, and where one sample in fifty can be used, one is
# found among them in 99 of 100 data sets.
IN_VAIN = 256


def may_be_left_out(error: CachekdError, on_error: str) -> bool:
    """Whether to go on without a sample. What is stale, or no fault of one sample's, stops whatever runs."""
    return isinstance(error, LeftOut) or (isinstance(error, BadSample) and on_error == "skip")


def reason_of(error: CachekdError) -> str:
    """What is wrong, in one line."""
    found = "" if error.found is None else f": {error.found}"
    return " ".join(f"{error.problem}{found}".split())


@dataclass(frozen=True)
class LeftOutSamples:
    """Samples that were left out, as summaries and records name them.

    Attributes:
        samples: how many.
        first: of up to `NAMED` of them, key to reason.
    """

    samples: int = 0
    first: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, reasons: Mapping[str, str]) -> LeftOutSamples:
        """Count all, key to reason, and name the first."""
        return cls(len(reasons), dict(islice(reasons.items(), NAMED)))


class BadSamples:
    """The bad samples that were met, each once however often it came.

    Attributes:
        reasons: key to reason.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def note(self, key: str, error: CachekdError) -> None:
        """Take note of one, and log the first ones."""
        if key in self.reasons:
            return
        self.reasons[key] = reason_of(error)
        if len(self.reasons) <= _LOGGED:
            log.warning("sample %r is left out: %s", key, self.reasons[key])
        elif len(self.reasons) == _LOGGED + 1:
            log.warning("more samples are left out; they are counted, and named at the end")

    def add(self, others: Iterable[Mapping[str, str]]) -> None:
        """Add what other processes, or this run before a checkpoint, met."""
        for reasons in others:
            self.reasons = {**reasons, **self.reasons}

    def save(self, checkpoint: Path) -> None:
        """Write them beside the state that a run goes on from."""
        commit(checkpoint / _FILE, json.dumps(self.reasons).encode())

    def load(self, checkpoint: Path) -> None:
        """Add what was met before; a checkpoint says nothing where nothing was."""
        file = checkpoint / _FILE
        if file.exists():
            self.add([json.loads(file.read_text())])


def attempts(
    count: int, attempt: Callable[[int], T | BadSample], on_error: str = "stop"
) -> Iterator[tuple[int, T | BadSample]]:
    """Try something on samples until it was in vain too often.

    In their order; but after 16 bad ones all over the data, as neighbours are often bad for the same reason.

    Args:
        count: how many samples there are.
        attempt: by a sample's index; a bad sample may be returned or raised.
        on_error: whether one that is raised ends the attempts, as it ends whatever they are made for.

    Yields:
        index, and what came of it; a bad sample holds on to nothing that led to it. Those that the settings
        leave out are no attempts in vain.
    """
    tried: set[int] = set()
    in_vain = 0
    for indices, most in ((range(count), IN_A_ROW), (spread(count), IN_VAIN)):
        for index in indices:
            if in_vain >= most or len(tried) == count:
                break
            if index in tried:
                continue
            tried.add(index)
            found = _attempted(attempt, index, on_error)
            in_vain += isinstance(found, BadSample) and not isinstance(found, LeftOut)
            yield index, found


def first_good(count: int, attempt: Callable[[int], T | BadSample], on_error: str = "stop") -> tuple[int, T]:
    """The first sample that something can be done with, and what came of it; the arguments are `attempts`'s.

    Raises:
        CachekdError: what is wrong with a sample that ends the attempts, or with the first of all in vain.
    """
    bad = []
    for index, found in attempts(count, attempt, on_error):
        if not isinstance(found, BadSample):
            return index, found
        bad.append(found)
    first = bad[0] if bad else BadSample("there is no sample")
    raise CachekdError(
        "no sample can be used",
        where=first.where,
        expected=first.expected,
        found=f"{len(bad):,} of {count:,} were tried in vain, the first: {first.problem}: {first.found}",
        fix=first.fix,
    )


def _attempted(attempt: Callable[[int], T | BadSample], index: int, on_error: str) -> T | BadSample:
    try:
        return attempt(index)
    except BadSample as error:
        if not may_be_left_out(error, on_error):
            raise
        return without_frames(error)


class DataHealth:
    """Stops whatever leaves samples out when it is not they that are bad, but the data that have gone.

    That a sample is too long, or that a model cannot run on it, says nothing of the disk, and such samples
    may be neighbours: sorted by length, say. So after 16 in a row one that was good is read again.

    Args:
        count: how many samples there are.
        read: by a sample's index; a bad sample may be returned or raised.
    """

    def __init__(self, count: int, read: Callable[[int], object]) -> None:
        self._count, self._read = count, read
        self._in_a_row = 0
        self._good: int | None = None

    def good(self, index: int | None = None) -> None:
        """One was good.

        Args:
            index: the sample's, to be read again; None: an earlier one is.
        """
        self._in_a_row = 0
        self._good = self._good if index is None else index

    def bad(self, errors: Iterable[CachekdError]) -> None:
        """Some were bad, and none between them good. (Those that the settings leave out do not count.)

        Raises:
            CachekdError: data that have gone.
        """
        before = self._in_a_row
        self._in_a_row += sum(not isinstance(error, LeftOut) for error in errors)
        if self._in_a_row // IN_A_ROW > before // IN_A_ROW:
            self._look(f"{self._in_a_row} samples in a row are bad, and ")

    def require_there(self) -> None:
        """Read again what was good, if anything was.

        Raises:
            CachekdError: it is bad now.
        """
        if self._good is not None:
            self._look("")

    def _look(self, seen: str) -> None:
        if self._good is not None:
            found = _attempted(self._read, self._good, "skip")
            seen += "one that was good is bad now"
        else:
            for index, found in attempts(self._count, self._read, "skip"):
                if not isinstance(found, BadSample):
                    self._good = index
                    break
            seen += "so are others all over the data"
        if isinstance(found, BadSample):
            raise CachekdError(
                f"{seen}, so the data have probably gone",
                where=found.where,
                found=found.problem,
                fix="mend the data, then run the same command again",
            )
