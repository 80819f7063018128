"""The best student so far, by what evaluations say: it has a checkpoint, and the run ends with it."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from cachekd.errors import CachekdError


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
