"""What a report reads: a run's record, and its scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachekd.errors import CachekdError
from cachekd.evaluate import Evaluation, read_records
from cachekd.paths import RUN_FILE, shortest
from cachekd.report.pages import RUN_COLORS

_NEEDED = {"log", "config", "cache", "k_histogram", "steps", "seconds", "versions"}


@dataclass(frozen=True)
class Run:
    """A run, as `cachekd train` and `cachekd eval` left it.

    Attributes:
        name: on the page.
        record: cachekd_run.json.
        evaluations: one for each set of questions that it was asked, the newest first.
        color: of its curves and bars, a name in the style sheet.
    """

    folder: Path
    name: str
    record: dict[str, Any]
    evaluations: list[Evaluation]
    color: str = RUN_COLORS[0]

    @property
    def steps(self) -> list[dict[str, float]]:
        """The log's entries of optimizer steps, without the summary at its end."""
        return [entry for entry in self.record["log"] if "loss" in entry]

    @property
    def validations(self) -> list[dict[str, float]]:
        """The log's entries of held-out data."""
        return [entry for entry in self.record["log"] if "eval_loss" in entry]

    def scores_on(self, fingerprint: str) -> Evaluation | None:
        """On the questions with this fingerprint."""
        return next((one for one in self.evaluations if one.asked.fingerprint == fingerprint), None)


def read_run(folder: str | Path) -> Run:
    """Read what a run's folder holds.

    Raises:
        CachekdError: the folder is not a run, or what it holds cannot be read.
    """
    folder = Path(folder)
    path = folder / RUN_FILE
    if not path.exists():
        raise CachekdError(
            "this is not a run", where=str(folder), expected=RUN_FILE, fix="run `cachekd train`"
        )
    return Run(folder, folder.resolve().name, _read_record(path), read_records(folder))


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CachekdError("the run's record cannot be read", where=str(path), found=str(error)) from None
    if not isinstance(record, dict) or not record.keys() >= _NEEDED:
        raise CachekdError(
            "this is not a run's record",
            where=str(path),
            expected=f"an object with {', '.join(sorted(_NEEDED))}",
            found=", ".join(list(record)[:5]) if isinstance(record, dict) else type(record).__name__,
        )
    return record


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The same runs, each with a colour, and with as much of its path as no two of them share.

    Raises:
        CachekdError: a run is among them twice, or there are more than there are colours.
    """
    if len(runs) > len(RUN_COLORS):
        raise CachekdError(
            f"a report compares {len(RUN_COLORS)} runs at most",
            found=f"{len(runs)}",
            fix="name fewer baselines",
        )
    paths = [run.folder.resolve() for run in runs]
    twice = [str(path) for path in paths if paths.count(path) > 1]
    if twice:
        raise CachekdError("a run is compared with itself", where=twice[0], fix="name another baseline")
    return [
        replace(run, name=name, color=color)
        for run, name, color in zip(runs, shortest(paths), RUN_COLORS, strict=False)
    ]
