"""Samples that a dump, a run or an evaluation leaves out: which, and why."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from cachekd.atomic import commit
from cachekd.errors import BadSample, CachekdError, LeftOut

log = logging.getLogger(__name__)

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
