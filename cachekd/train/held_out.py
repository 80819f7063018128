"""Held-out data of a run, opened and checked before any weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachekd.cache import LogitCache
from cachekd.cache.compare import ENCODING, dependencies, require_same
from cachekd.check.data import RunModels, checked_cache
from cachekd.check.data_rows import has_pictures
from cachekd.config import TrainConfig
from cachekd.config.data import OnError
from cachekd.data import Samples, open_samples
from cachekd.data.left_out import LeftOutSamples
from cachekd.errors import about
from cachekd.losses.terms import TERMS, labels
from cachekd.train.arguments import metric_of

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)

# Terms of two caches can be compared where these are the same.
_OF_THE_TEACHER = (
    "teacher's weights",
    "teacher's configuration",
    "teacher's quantisation",
    "image processing",
)
_OF_TEXT = ("tokenizer", "chat template", ENCODING)
_OF_KNEEDLE = ("setting window", "setting min_k")


@dataclass(frozen=True)
class HeldOut:
    """What a run evaluates, checked as far as it can be without any model's weights in memory.

    Attributes:
        samples: to evaluate.
        models: with the limits of these data.
        cache: the teacher's of them.
        on_error: whether a bad sample stops the run, or is left out of evaluations.
        missing: that the cache lacks and that are left out of them.
        terms: that are computed on them.
    """

    samples: Samples
    models: RunModels
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
    with about("eval_cache", "or leave eval_cache out: L_CE alone is then evaluated"):
        eval_cache, models, missing, _ = checked = checked_cache(held_out, models, samples, cache)
        if cache is not None and eval_cache is not None:
            require_same_teacher(config, cache, eval_cache)
    samples = checked.used(samples)
    terms = config.eval_terms
    if not has_pictures(samples, eval_cache):
        terms = tuple(name for name in terms if TERMS[name].path == "own")
    metric_of(config, terms)
    say_what_is_not_computed(config, terms)
    left_out = LeftOutSamples.of(missing)
    return HeldOut(samples, models, eval_cache, held_out.on_error, left_out, terms)


def say_what_is_not_computed(config: TrainConfig, terms: tuple[str, ...]) -> None:
    """Log it once, in one line: an evaluation of L_CE alone must not be taken for one of all terms.

    Args:
        terms: that are computed.
    """
    if lacking := [name for name in config.terms if name not in terms]:
        log.warning(
            "on the held-out data %s not computed, and not in eval_loss: %s",
            labels(lacking) + (" are" if lacking[1:] else " is"),
            "none of them has a picture"
            if config.eval_is_taught
            else "there is no teacher of them: set eval_cache",
        )


def require_same_teacher(config: TrainConfig, cache: LogitCache, eval_cache: LogitCache) -> None:
    """Refuse a cache of held-out data whose terms cannot be compared with those of training.

    Raises:
        CachekdError: it is of another teacher, unless that is only quantised otherwise and this is accepted;
            or of other settings of Kneedle, where a term asks for them.
    """
    known = (dependencies(found.manifest) for found in (cache, eval_cache))
    accept = config.teacher_mismatch == "accept"
    names = [name for name in _OF_THE_TEACHER if not (accept and name == "teacher's quantisation")]
    names += (*_OF_TEXT, *(_OF_KNEEDLE if config.dbilds else ()))
    ours, theirs = ({name: found.get(name) for name in names} for found in known)
    require_same(
        ours,
        theirs,
        f"the training data's cache, {cache.path}, beside that of the held-out data,",
        str(eval_cache.path),
    )
