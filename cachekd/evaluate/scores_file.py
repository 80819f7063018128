"""Scores on the disk: of one evaluation, and of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from cachekd.atomic import require_place, write_file
from cachekd.errors import CachekdError, first_line
from cachekd.evaluate.scores import Evaluation
from cachekd.lock import alone
from cachekd.paths import EVALUATIONS_FOLDER, RUN_FILE, SCORES_FILE

_OF_AGREEMENT = ("top1_agreement", "kl", "agrees_with", "over_cells")
_PATIENCE = 60.0  # seconds; another evaluation saves its own within a moment


def save_in_runs(result: Evaluation) -> None:
    """Leave each run among the models its own row, beside the teacher's and the prior's.

    A file is named by the questions' fingerprint, so that scores on other data stay as they are. What an
    earlier evaluation of the same questions found and this one did not look at stays too, if the model's
    answers are the same.

    Raises:
        CachekdError: a file cannot be read or written.
    """
    now = datetime.now(UTC).isoformat()
    for score in result.models:
        if (Path(score.name) / RUN_FILE).exists():
            path = scores_path(Path(score.name), result.asked.fingerprint)
            own = result.model_copy(update={"models": [score], "differences": [], "at": now})
            with alone(path.parent, "saves scores in", patience=_PATIENCE):
                if path.exists():
                    own = _completed(own, read_evaluation(path))
                write_file(path, own.compared().model_dump_json(indent=1).encode())


def require_kept_scores(models: Sequence[str]) -> None:
    """Refuse at once what could not be kept, not after the evaluation.

    Raises:
        CachekdError: a run among the models holds scores that cannot be read, or cannot be written to.
    """
    for path in map(Path, models):
        if (path / RUN_FILE).exists():
            require_place(scores_path(path, "0"))
            read_scores(path)


def only_writer(folder: Path | None) -> AbstractContextManager[None]:
    """Hold the folder for `save_scores`, from before the first question is asked.

    Raises:
        CachekdError: another evaluation writes into it.
    """
    return nullcontext() if folder is None else alone(folder, "writes scores into")


def save_scores(result: BaseModel, folder: Path) -> None:
    """All rows of an evaluation, or of public benchmarks, as scores.json in a folder, which is made
    where there is none.

    Raises:
        CachekdError: it cannot be written.
    """
    write_file(folder / SCORES_FILE, result.model_dump_json(indent=1).encode())


def scores_path(run: Path, fingerprint: str) -> Path:
    """Where a run keeps its scores on the questions with this fingerprint."""
    return run / EVALUATIONS_FOLDER / f"{fingerprint[:16]}.json"


def read_scores(run: Path) -> list[Evaluation]:
    """All scores that a run keeps, the newest first; `models` of each is the run alone.

    Raises:
        CachekdError: one of the files cannot be read.
    """
    paths = sorted((run / EVALUATIONS_FOLDER).glob("*.json"))
    return sorted(map(read_evaluation, paths), key=lambda scores: scores.at, reverse=True)


def read_evaluation(path: Path) -> Evaluation:
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
            found=first_line(error),
            fix="remove the file, and run `cachekd eval` again",
        ) from None


def _completed(new: Evaluation, earlier: Evaluation) -> Evaluation:
    """The new rows, with what only the earlier ones have. The questions are the same."""
    [ours], [theirs] = new.models, earlier.models
    if (new.dtype, ours.correct) != (earlier.dtype, theirs.correct):
        return new  # these were another model's, or other arithmetic's
    update: dict[str, object] = {} if ours.blind else {"blind": theirs.blind}
    asked_again = ours.agrees_with is not None or new.teacher is not None
    if ours.agrees_with is None:
        update |= {name: getattr(theirs, name) for name in _OF_AGREEMENT}
    ours = ours.model_copy(update=update)
    kept: dict[str, object] = {"models": [ours]}
    if new.prior is None:
        kept |= {"prior": earlier.prior, "prior_left_out": earlier.prior_left_out}
    same = not asked_again or new.teacher_quantization == earlier.teacher_quantization
    if new.teacher is None and earlier.teacher is not None and same:
        # Unless it is the row of another than the agreement is with.
        kept["teacher"] = earlier.teacher if ours.agrees_with in (None, earlier.teacher.name) else None
    if not asked_again:
        kept["teacher_quantization"] = earlier.teacher_quantization
    return new.model_copy(update=kept)
