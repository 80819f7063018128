"""The scores that a run keeps: a file for each set of questions that it was asked."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from cachekd.cache.files import commit
from cachekd.errors import CachekdError
from cachekd.evaluation.scores import Evaluation, Score
from cachekd.files import EVALUATIONS_FOLDER, RUN_FILE


def save_in_runs(result: Evaluation) -> None:
    """Leave each run among the models its own row, beside the teacher's and the prior's.

    A file is named by the questions' fingerprint, so that scores on other data stay as they are. What an
    earlier evaluation of the same questions found and this one did not look at stays too.
    """
    for score in result.models:
        if (Path(score.name) / RUN_FILE).exists():
            path = record_path(Path(score.name), result.asked.fingerprint)
            own = result.model_copy(update={"models": [score], "differences": []})
            if path.exists():
                own = _completed(own, read_record(path))
            path.parent.mkdir(exist_ok=True)
            commit(path, own.compared().model_dump_json(indent=1).encode())


def record_path(run: Path, fingerprint: str) -> Path:
    """Where a run keeps its scores on the questions with this fingerprint."""
    return run / EVALUATIONS_FOLDER / f"{fingerprint[:16]}.json"


def read_records(run: Path) -> list[Evaluation]:
    """All scores that a run keeps, the newest first; `models` of each is the run alone.

    Raises:
        CachekdError: one of the files cannot be read.
    """
    paths = (run / EVALUATIONS_FOLDER).glob("*.json")
    return [read_record(path) for path in sorted(paths, key=lambda path: -path.stat().st_mtime_ns)]


def read_record(path: Path) -> Evaluation:
    """One file of scores.

    Raises:
        CachekdError: it cannot be read.
    """
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CachekdError(
            "the scores of a run cannot be read",
            where=str(path),
            found=str(error).splitlines()[0],
            fix="remove the file, and run `cachekd eval` again",
        ) from None


def _completed(new: Evaluation, earlier: Evaluation) -> Evaluation:
    """The new rows, with what only the earlier ones have. The questions are the same."""
    [ours], [theirs] = new.models, earlier.models
    return new.model_copy(
        update={
            "teacher": new.teacher or earlier.teacher,
            "prior": new.prior or earlier.prior,
            "models": [_filled(ours, theirs)],
        }
    )


def _filled(ours: Score, theirs: Score) -> Score:
    kept = {name: getattr(theirs, name) for name in ("top1_agreement", "kl", "blind")}
    missing = {name: value for name, value in kept.items() if getattr(ours, name) is None}
    return ours.model_copy(update=missing)
