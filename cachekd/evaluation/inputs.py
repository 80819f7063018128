"""What an evaluation reads, opened and tried before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable

from cachekd.cache import LogitCache
from cachekd.check.bind import open_bound
from cachekd.check.missing import missing_samples
from cachekd.config import EvalConfig
from cachekd.config.data import ROW_NUMBERS
from cachekd.data import SampleEncoder, Samples, open_samples
from cachekd.data.left_out import first_good
from cachekd.errors import CachekdError
from cachekd.evaluation.prior import AnswerPrior, prior_of
from cachekd.evaluation.questions import QuestionEncoder
from cachekd.models import ModelFiles, limits_of, tokenizer_difference
from cachekd.models.fingerprint import tokenizer_fingerprint

Progress = Callable[[str, int, int, int], None]
"""The model that is asked, or "prior"; the samples in all; samples and questions since the last call."""


def open_models(config: EvalConfig) -> dict[str, ModelFiles]:
    """Each model's files, by its path; the limits are those of all.

    Raises:
        CachekdError: a model cannot be found, or their tokenizers differ.
    """
    models = {path: ModelFiles(path) for path in ([config.teacher] if config.teacher else []) + config.models}
    # A cut answer is an easier question: a longer sample is left out where a dump would cut it.
    too_long = "skip" if config.too_long == "cut" else config.too_long
    configs = [model.config for model in models.values()]
    limits = limits_of(configs, max_tokens=config.max_tokens, too_long=too_long)
    models = {path: model.within(limits) for path, model in models.items()}
    first, *others = models.values()
    for other in others:
        ours, theirs = first.processor.tokenizer, other.processor.tokenizer
        if (difference := tokenizer_difference(ours, theirs)) is not None:
            raise CachekdError(
                "the models have different tokenizers, and answers are compared by their tokens",
                where=f"{ours.name_or_path} and {theirs.name_or_path}",
                found=difference,
                fix="evaluate them one by one",
            )
    return models


def try_encoder(config: EvalConfig, samples: Samples, encoder: SampleEncoder) -> None:
    """A sample through it: what a later model cannot read is known before the first is loaded.

    Raises:
        CachekdError: it can use none of the samples.
    """
    encode = QuestionEncoder(encoder, config.history, blind=False)
    first_good(len(samples), lambda index: encode(samples[index]), config.on_error)


def open_cache(config: EvalConfig, samples: Samples, model: ModelFiles) -> tuple[LogitCache, dict[str, str]]:
    """The teacher's logits of the data; and the samples that it lacks, key to why.

    Args:
        model: any of those that are asked.

    Raises:
        CachekdError: it cannot be read, is of another tokenizer than the models', or lacks samples (all of
            them, where `on_error` is "skip").
    """
    cache = open_tokenized(str(config.cache), model)
    missing = missing_samples(cache, samples, config)
    if missing and (config.on_error == "stop" or len(missing) == len(samples)):
        first = next(key for key in samples.keys if key not in cache)
        counted = f"{len(missing):,} are not in it, the first is {first!r}"
        raise CachekdError(
            "the cache lacks samples of the data set",
            where=f"{cache.path} and {config.data}",
            expected=f"all of {len(samples):,} samples",
            found="; ".join([counted, *missing.causes()]),
            fix="dump these data; or --on-error skip leaves out what it lacks, if it has others",
        )
    return cache, missing.reasons


def open_tokenized(path: str, model: ModelFiles) -> LogitCache:
    """A cache of the models' tokenizer.

    Args:
        model: any of those that are asked.

    Raises:
        CachekdError: it cannot be read, or is of another.
    """
    cache = open_bound(path)
    ours, theirs = tokenizer_fingerprint(model.processor.tokenizer), cache.manifest.fingerprints.tokenizer
    if ours != theirs:
        raise CachekdError(
            "the cache was made with a different tokenizer than the models'",
            where=f"{cache.path} and {model.path}",
            expected=f"sha256 {theirs}",
            found=f"sha256 {ours}",
            fix="evaluate without --cache, or dump the data with a teacher of this tokenizer",
        )
    return cache


def read_prior(config: EvalConfig, progress: Progress) -> tuple[AnswerPrior, int]:
    """Of the training data, whose records are read as the test data's unless they say otherwise.

    Raises:
        CachekdError: they cannot be read, or say nothing.
    """
    assert config.prior_data is not None
    # Neither keys nor pictures matter, and theirs may have other names than the test data's.
    anything = {"key": ROW_NUMBERS, "image_field": (), "image_root": None}
    data = config.prior_data.inheriting_from(config).model_copy(update=anything)
    samples, what = open_samples(data), "prior"
    progress(what, len(samples), 0, 0)
    return prior_of(samples, data.data, data.on_error, lambda done: progress(what, len(samples), done, 0))
