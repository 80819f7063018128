"""A run's checkpoints: the Trainer's, each whole or not one to go on from, with the settings of its run; and
which one has the best student."""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from cachekd.atomic import commit
from cachekd.errors import CachekdError, is_failed_write, what_failed

SETTINGS_FILE = "cachekd_settings.json"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole one in a folder; the Trainer writes its state last, so one without was cut short."""
    return max(filter(_is_whole, folder.glob("checkpoint-*")), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that are in a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def note_settings(settings: dict[str, Any], checkpoint: Path) -> None:
    """Write into a checkpoint what it is made with."""
    commit(checkpoint / SETTINGS_FILE, json.dumps(settings, indent=1).encode())


@contextmanager
def saving_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Remove what there is of a checkpoint if the block, which saves it, fails for the disk: it takes room.

    Raises:
        CachekdError: it could not be saved; what there is to go on from.
    """
    try:
        yield
    except Exception as error:
        if not is_failed_write(error):
            raise
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
        newest = newest_checkpoint(checkpoint.parent)
        then = "there is no earlier one, and the same command begins anew"
        if newest is not None:
            then = f"{newest.name} stays, and the same command goes on from step {step_of(newest):,}"
        raise CachekdError(
            "a checkpoint could not be saved: the disk is full, or cannot be written",
            where=str(checkpoint),
            found=what_failed(error),
            fix=f"free some space on this disk; {then}",
        ) from error


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False


class KeepBest(TrainerCallback):
    """Gives the best student so far a checkpoint, wherever `save_steps` falls. The one that training began
    with is not among them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where its checkpoint lies may have another name than in an earlier session."""
        if args.load_best_model_at_end:
            state.best_model_checkpoint = best_checkpoint(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Compares as the Trainer does, which takes note of the best one after this."""
        if not args.load_best_model_at_end or state.global_step == 0:  # `eval_on_start`
            return
        value = metrics[f"eval_{args.metric_for_best_model.removeprefix('eval_')}"]
        better = operator.gt if args.greater_is_better else operator.lt
        before = state.best_metric
        if before is None:
            before = float("-inf" if args.greater_is_better else "inf")
        control.should_save |= better(value, before)


def best_checkpoint(args: TrainingArguments, state: TrainerState) -> str | None:
    """The checkpoint of the best evaluation; None before the first.

    Raises:
        CachekdError: it is gone: the run would end with another student than it says.
    """
    if not state.best_global_step:
        return None
    best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
    if not best.is_dir():
        raise CachekdError(
            "the best student's checkpoint is gone",
            where=str(best),
            expected=f"the student of step {state.best_global_step:,}, {state.best_metric:.4f}",
            fix=f"put it back; or remove {best.parent}, and the same command begins anew",
        )
    return str(best)
