"""Data and their cache as a run opens them: held-out data and those that it trains on alike."""

from __future__ import annotations

from typing import Any, NamedTuple

from cachekd.cache import LogitCache
from cachekd.cache.source import DataInfo
from cachekd.check.bind import open_bound
from cachekd.check.match import check_cache
from cachekd.check.missing import dumped_data
from cachekd.config import DataOptions, TrainConfig
from cachekd.data import Limits, SampleEncoder, Samples
from cachekd.data.left_out import LeftOutSamples
from cachekd.data.map_function import require_map
from cachekd.data.sample import Subset
from cachekd.errors import CachekdError
from cachekd.models import ModelFiles, limits_of

# Which sample a record becomes, under which key, with which tokens; not how many of them.
_LENGTHS = ("max_tokens", "too_long")
_AS_DUMPED = ("key", "image_field", *_LENGTHS)


def as_dumped(options: DataOptions, cache: LogitCache, *, bound: bool = False) -> DataOptions:
    """The user's options, and what they do not say as the cache's dump had it.

    Args:
        bound: they are other data than the dump's, bound to the cache: how records become samples is theirs.

    Raises:
        CachekdError: the dump had a map function, which only the user may name, and they do not.
    """
    info = cache.manifest.sources[0].data
    if bound:
        return options.model_copy(update=unsaid(options, info, *_LENGTHS))
    map_function = require_map(options.map, info.map, str(cache.path))
    return options.model_copy(update={**unsaid(options, info, *_AS_DUMPED), "map": map_function})


def unsaid(options: DataOptions, dumped: DataInfo | DataOptions, *names: str) -> dict[str, Any]:
    """Those of these options that the user does not say, as the dump had them."""
    return {name: getattr(dumped, name) for name in names if name not in options.model_fields_set}


class RunModels(NamedTuple):
    """The models of a run; the teacher None where none runs in it."""

    student: ModelFiles
    teacher: ModelFiles | None

    @classmethod
    def of(cls, config: TrainConfig) -> RunModels:
        """Name the models that the settings name; nothing is opened."""
        return cls(
            ModelFiles(config.student), ModelFiles(str(config.teacher)) if config.runs_teacher else None
        )


def open_cache(config: TrainConfig) -> LogitCache | None:
    """The cache, under the data's keys; None if none is used.

    Raises:
        CachekdError: it cannot be read, or was made with other settings of Kneedle.
    """
    if not config.distils or config.live_teacher:
        return None
    assert config.cache is not None  # as `require_inputs` saw
    cache = open_bound(config.cache, config.binding)
    codec = cache.manifest.codec
    for name, theirs in (("window", codec.window), ("min_k", codec.min_k)):
        ours = getattr(config, name)
        if ours not in (None, theirs):
            raise CachekdError(
                "the cache was made with another Kneedle setting",
                where=f"setting {name!r}",
                expected=f"{theirs}, as in {cache.path}",
                found=ours,
                fix=f"leave {name!r} out: a cache has its own",
            )
    return cache


def length_limits(config: TrainConfig, cache: LogitCache | None, models: RunModels) -> Limits:
    """What the models that read the samples allow, and the settings."""
    said = length_settings(config, None if cache is None else dumped_data(cache))
    return limits_of([model.config for model in models if model is not None], **said)


def length_settings(config: TrainConfig, dumped: DataInfo | DataOptions | None) -> dict[str, Any]:
    """`max_tokens` and `too_long`; those that the run does not say are as in the dump.

    Args:
        dumped: of its cache, where it has one (see `dumped_data`).
    """
    said = config.model_dump(include={"max_tokens", "too_long"})
    return said if dumped is None else said | unsaid(config, dumped, *said)


def without_missing(
    config: TrainConfig, samples: Samples, cache: LogitCache | None, encoder: SampleEncoder
) -> tuple[Samples, LeftOutSamples]:
    """The samples that are used, and those that are left out because the cache lacks them.

    Raises:
        CachekdError: the cache does not match the student's tokenizer, the template or the data; or the run
            would stop at samples that it lacks.
    """
    if cache is None:
        return samples, LeftOutSamples()
    data = None if config.binding is not None else config
    choices = {"missing": config.missing, "on_error": config.on_error}
    missing = check_cache(cache, samples, encoder, data=data, **choices).reasons
    if config.missing != "skip" or not missing:
        return samples, LeftOutSamples()
    kept = [index for index, key in enumerate(samples.keys) if key not in missing]
    return Subset(samples, only=kept), LeftOutSamples.of(missing)
