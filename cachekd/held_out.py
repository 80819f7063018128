"""Held-out data and their cache, opened and checked before any model's weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cachekd.cache import LogitCache
from cachekd.cache.compare import facts, require_same
from cachekd.config import TrainConfig
from cachekd.data_options import OnError
from cachekd.errors import CachekdError, within
from cachekd.left_out import LeftOutSamples
from cachekd.samples import SampleEncoder, Samples

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


@contextmanager
def about(setting: str, then: str | None = None) -> Iterator[None]:
    """Errors within are about this setting, not about the run's own data."""
    try:
        yield
    except CachekdError as error:
        raise within(f"setting {setting!r}", error, then) from error


def say_what_is_not_computed(config: TrainConfig, held_out: HeldOut) -> None:
    """Once, in one line: an evaluation of L_CE alone must not be taken for one of all terms."""
    names = {"align": "L_Align", "vsd": "L_VSD"}
    on = [name for name, weight in (("align", config.lambda_align), ("vsd", config.lambda_vsd)) if weight]
    lacking = [name for name in on if name not in held_out.terms]
    if lacking:
        taught = "align" in held_out.terms or held_out.cache is not None or config.live_teacher
        why = "none of them has a picture" if taught else "there is no teacher of them: set eval_cache"
        log.warning(
            "on the held-out data %s not computed, and not in eval_loss: %s",
            " and ".join(names[name] for name in lacking) + (" are" if lacking[1:] else " is"),
            why,
        )


def require_same_teacher(cache: LogitCache, eval_cache: LogitCache) -> None:
    """Refuse a cache of held-out data whose terms cannot be compared with those of training.

    Raises:
        CachekdError: it is of another teacher, or of other settings of Kneedle.
    """
    ours, theirs = (facts(found.manifest) for found in (cache, eval_cache))
    require_same(
        {name: ours[name] for name in _OF_THE_TEACHER},
        {name: theirs[name] for name in _OF_THE_TEACHER},
        f"the training data's cache, {cache.path}, beside that of the held-out data,",
        str(eval_cache.path),
    )
