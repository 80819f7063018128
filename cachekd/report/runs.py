"""What a report reads: what a run saved, and its scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachekd.errors import CachekdError
from cachekd.evaluate import Evaluation, read_scores
from cachekd.paths import RUN_FILE, shortest
from cachekd.report.pages import RUN_COLORS

_NEEDED = {"config", "versions", "cache", "k_histogram", "seconds", "steps", "resumed_from", "log"} | {
    "uncovered_samples",
    "left_out",
    "data_wait",
}


@dataclass(frozen=True)
class Run:
    """A run, as `cachekd train` and `cachekd eval` left it.

    Attributes:
        name: on the page.
        saved: what cachekd_run.json says.
        evaluations: one for each set of questions that it was asked, the newest first.
        color: of its curves and bars, a name in the style sheet.
    """

    folder: Path
    name: str
    saved: dict[str, Any]
    evaluations: list[Evaluation]
    color: str = RUN_COLORS[0]

    @property
    def steps(self) -> list[dict[str, float]]:
        """The log's entries of optimizer steps, without the summary at its end."""
        return [entry for entry in self.saved["log"] if "loss" in entry]

    @property
    def validations(self) -> list[dict[str, float]]:
        """The log's entries of held-out data."""
        return [entry for entry in self.saved["log"] if "eval_loss" in entry]

    def scores_on(self, fingerprint: str) -> Evaluation | None:
        """Find the scores on the questions with this fingerprint."""
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
    return Run(folder, folder.resolve().name, _read_run_file(path), read_scores(folder))


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        saved: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CachekdError("what the run saved cannot be read", where=str(path), found=str(error)) from None
    if not isinstance(saved, dict) or not saved.keys() >= _NEEDED:
        raise CachekdError(
            "this is not what a run saves",
            where=str(path),
            expected=f"an object with {', '.join(sorted(_NEEDED))}",
            found=", ".join(list(saved)[:5]) if isinstance(saved, dict) else type(saved).__name__,
        )
    return saved


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Give each run a colour, and as much of its path as no two of them share.

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
