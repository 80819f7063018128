"""Samples that a dump, a run or an evaluation leaves out: which, why, and when there are too many."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from cachekd.cache.files import commit
from cachekd.errors import BadSample, CachekdError, LeftOut

log = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]
# A data folder that has gone makes every sample bad. Fewer than this in a row may be chance.
ALL_BAD = 16
NAMED = 100  # samples in a record; all are counted
_FILE = "cachekd_left_out.json"  # in a checkpoint
_LOGGED = 10  # a line each; what follows is counted


def may_be_left_out(error: CachekdError, on_error: str) -> bool:
    """Whether to go on without a sample. What is stale, or no fault of one sample's, stops whatever runs."""
    return isinstance(error, LeftOut) or (isinstance(error, BadSample) and on_error == "skip")


def reason_of(error: CachekdError) -> str:
    """What is wrong, in one line."""
    found = "" if error.found is None else f": {error.found}"
    return " ".join(f"{error.problem}{found}".split())


def vanished(problem: str, error: CachekdError) -> CachekdError:
    """What to say of data that have gone.

    Args:
        error: of the last sample.
    """
    return CachekdError(
        f"{problem}, so the data have probably gone",
        where=error.where,
        found=error.problem,
        fix="mend the data, then run the same command again: what is finished stays",
    )


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
        """All of them, key to reason."""
        return cls(len(reasons), dict(islice(reasons.items(), NAMED)))


class BadSamples:
    """The bad samples that were met, each once however often it came; it tells them from data that have gone.

    Attributes:
        reasons: key to reason.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._in_a_row = 0

    def saw(self, bad: Mapping[str, CachekdError], good: int) -> None:
        """Take note of what was read next.

        Args:
            bad: by key, in any order among the good ones.
            good: how many.

        Raises:
            CachekdError: nothing was good for so long that the data have probably gone.
        """
        for key, error in bad.items():
            self._note(key, reason_of(error))
        in_a_row = sum(not isinstance(error, LeftOut) for error in bad.values())
        self._in_a_row = 0 if good else self._in_a_row + in_a_row
        if self._in_a_row >= ALL_BAD:
            raise vanished(f"{self._in_a_row} samples in a row are bad", next(iter(bad.values())))

    def _note(self, key: str, reason: str) -> None:
        if key in self.reasons:
            return
        self.reasons[key] = reason
        if len(self.reasons) <= _LOGGED:
            log.warning("sample %r is left out: %s", key, reason)
        elif len(self.reasons) == _LOGGED + 1:
            log.warning("more samples are left out; they are counted, and named at the end")

    def out_of(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches; which samples each lacks is noted, and no longer in it.

        Raises:
            CachekdError: as `saw`.
        """
        for batch in batches:
            self.saw(batch.pop("left_out", {}), len(batch["keys"]))
            yield batch

    def add(self, others: Iterable[Mapping[str, str]]) -> None:
        """What other processes, or this run before a checkpoint, met."""
        for reasons in others:
            self.reasons = {**reasons, **self.reasons}

    def save(self, checkpoint: Path) -> None:
        """Beside the state that a run goes on from."""
        commit(checkpoint / _FILE, json.dumps(self.reasons).encode())

    def load(self, checkpoint: Path) -> None:
        """What was met before; an older checkpoint does not say."""
        file = checkpoint / _FILE
        if file.exists():
            self.add([json.loads(file.read_text())])
