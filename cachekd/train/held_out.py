"""Held-out data while a student trains: opened; and the best student kept."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from cachekd.cache import LogitCache
from cachekd.cache.compare import dependencies, require_same
from cachekd.check.data import RunModels, length_limits, open_cache, without_missing
from cachekd.check.data_rows import has_pictures
from cachekd.config import TrainConfig
from cachekd.config.data import OnError
from cachekd.data import SampleEncoder, Samples, open_samples
from cachekd.data.left_out import LeftOutSamples
from cachekd.errors import CachekdError, about
from cachekd.losses.terms import TERMS
from cachekd.train.arguments import metric_of

log = logging.getLogger(__name__)

# Terms of two caches can be compared where these are the same.
_OF_THE_TEACHER = (
    "teacher's weights",
    "teacher's configuration",
    "image processing",
    "setting window",
    "setting min_k",
)


@dataclass(frozen=True)
class HeldOut:
    """What a run evaluates, checked as far as it can be without any model's weights in memory.

    Attributes:
        samples: to evaluate.
        encoder: the student's, with the limits of these data.
        cache: the teacher's of them.
        on_error: whether a bad sample stops the run, or is left out of evaluations.
        missing: that the cache lacks and that are left out of them.
        terms: that are computed on them.
    """

    samples: Samples
    encoder: SampleEncoder
    cache: LogitCache | None
    on_error: OnError
    missing: LeftOutSamples
    terms: tuple[str, ...]


def open_held_out(
    config: TrainConfig, models: RunModels, cache: LogitCache | None, phase: Callable[[str], None]
) -> HeldOut | None:
    """`eval_data` and `eval_cache`, checked as what the run trains on; None where there are no such data.

    Args:
        cache: of the training data. It says what is done with long samples, where nothing nearer does.

    Raises:
        CachekdError: what does not go together; the setting is named.
    """
    held_out = config.on_held_out()
    if held_out is None:
        return None
    phase("opening the held-out data")
    with about("eval_data"):
        samples = open_samples(held_out)
    with about("eval_cache"):
        eval_cache = open_cache(held_out) if config.eval_cache is not None else None
        if cache is not None and eval_cache is not None:
            require_same_teacher(cache, eval_cache)
    encoder = models.student.within(length_limits(held_out, eval_cache or cache, models)).encoder
    with about("eval_cache", "or leave eval_cache out: L_CE alone is then evaluated"):
        samples, missing = without_missing(held_out, samples, eval_cache, encoder)
    terms = config.eval_terms
    if not has_pictures(samples, eval_cache):
        terms = tuple(name for name in terms if TERMS[name].path == "own")
    metric_of(config, terms)
    say_what_is_not_computed(config, terms)
    return HeldOut(samples, encoder, eval_cache, held_out.on_error, missing, terms)


def say_what_is_not_computed(config: TrainConfig, terms: tuple[str, ...]) -> None:
    """Once, in one line: an evaluation of L_CE alone must not be taken for one of all terms.

    Args:
        terms: that are computed.
    """
    lacking = [TERMS[name].label for name in config.terms if name not in terms]
    if lacking:
        taught = config.eval_is_taught
        log.warning(
            "on the held-out data %s not computed, and not in eval_loss: %s",
            " and ".join(lacking) + (" are" if lacking[1:] else " is"),
            "none of them has a picture" if taught else "there is no teacher of them: set eval_cache",
        )


def require_same_teacher(cache: LogitCache, eval_cache: LogitCache) -> None:
    """Refuse a cache of held-out data whose terms cannot be compared with those of training.

    Raises:
        CachekdError: it is of another teacher, or of other settings of Kneedle.
    """
    ours, theirs = (dependencies(found.manifest) for found in (cache, eval_cache))
    require_same(
        {name: ours[name] for name in _OF_THE_TEACHER},
        {name: theirs[name] for name in _OF_THE_TEACHER},
        f"the training data's cache, {cache.path}, beside that of the held-out data,",
        str(eval_cache.path),
    )


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
