"""What an evaluation opens, and how often plain guessing is right."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from cachekd.cache import LogitCache
from cachekd.check.bind import open_bound
from cachekd.check.missing import missing_samples
from cachekd.check.vocabulary import vocabulary_of_cache
from cachekd.config import EvalConfig
from cachekd.config.data import ROW_NUMBERS, OnError
from cachekd.data import SampleEncoder, Samples, open_samples
from cachekd.data.left_out import first_good, may_be_left_out
from cachekd.errors import BadSample, CachekdError
from cachekd.evaluate.questions import QuestionEncoder, one_line, question_type
from cachekd.models import ModelFiles, default_device, dtype_of, limits_of
from cachekd.models.device_map import AUTO
from cachekd.models.fingerprint import tokenizer_fingerprint
from cachekd.models.loading import LoadSettings

NO_VOCABULARY = (
    "--teacher in place of --cache asks the teacher itself; or dump the data again; or leave out the models "
    "that have another tokenizer or chat template"
)


class AnswerPrior:
    """Answers a question by what was answered most often to the same question; to one that never came, by
    what was answered most often to those of its type; and else by the most frequent answer of all. Of equally
    frequent ones the first in the alphabet.

    Args:
        seen: questions and their answers.
    """

    def __init__(self, seen: Iterable[tuple[str, str]]) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for text, answer in seen:
            for name in _names(text):
                counts[name][answer.strip()] += 1
        self._answers = {
            name: min(counter, key=lambda answer: (-counter[answer], answer))
            for name, counter in counts.items()
        }

    def answer(self, text: str) -> str:
        """Answer a question; "" where nothing was seen at all."""
        return next((self._answers[name] for name in _names(text) if name in self._answers), "")


def _names(text: str) -> tuple[str, str, str]:
    """What a question counts as, the closest first; a type and a question may be the same words."""
    question = one_line(text)
    return f"question {question}", f"type {question_type(question)}", "all"


def _answered(samples: Samples, index: int, on_error: OnError) -> Sequence[tuple[str, str]]:
    try:
        return samples.preview(index).answered
    except BadSample as error:
        if not may_be_left_out(error, on_error):
            raise
        return ()


Progress = Callable[[str, int, int, int], None]
"""The model that is asked, or "prior"; the samples in all; samples and questions since the last call."""


def open_models(config: EvalConfig, files: Callable[[str], ModelFiles] = ModelFiles) -> dict[str, ModelFiles]:
    """Each model's files, by its path. The limits are those of all that have its tokenizer: what others
    cannot read is known when they are asked.

    Args:
        files: opens a model's; another one may have them open.

    Raises:
        CachekdError: a model cannot be found; or there is no teacher to quantise or place.
    """
    if config.quantization is not None and config.teacher is None:
        raise CachekdError(
            "there is no teacher to quantise: every other model is asked as it is saved",
            where="setting 'quantization'",
            fix="--teacher names the model that is to be quantised; it has a row of its own",
        )
    device_map = config.load_settings["device_map"]
    if device_map not in (None, AUTO) and config.teacher is None:
        raise CachekdError(
            "a device map from a file is for the teacher alone, and there is no teacher",
            where="setting 'device_map'",
            found=device_map,
            fix="--device-map auto, which holds for every model; or --teacher",
        )
    models = {path: files(path) for path in ([config.teacher] if config.teacher else []) + config.models}
    # A cut answer is an easier question: a longer sample is left out where a dump would cut it.
    too_long = "skip" if config.too_long == "cut" else config.too_long
    alike: dict[str, list[str]] = defaultdict(list)  # by tokenizer: of others, rows and lengths are others
    for path, model in models.items():
        model.require_attention(config.attn_implementation)
        alike[tokenizer_fingerprint(model.processor.tokenizer)].append(path)
    for paths in alike.values():
        configs = [models[path].config for path in paths]
        limits = limits_of(configs, max_tokens=config.max_tokens, too_long=too_long)
        models |= {path: models[path].within(limits) for path in paths}
    if config.teacher is not None:
        models[config.teacher].require_device_map(device_map)
        models[config.teacher].quantization(config.quantization, dtype_of(config.dtype, default_device()))
    return models


def load_settings_of(config: EvalConfig, *, as_teacher: bool = False) -> LoadSettings:
    """How a model is loaded: as it is saved, unless it is asked as the teacher. One folder may be both."""
    settings: LoadSettings = config.load_settings
    if as_teacher:
        return settings
    settings = settings | {"quantization": None}
    if settings["device_map"] != AUTO:
        settings["device_map"] = None  # a file names the teacher's modules
    return settings


def try_encoder(config: EvalConfig, samples: Samples, encoder: SampleEncoder) -> None:
    """A sample through it: what a later model cannot read is known before the first is loaded.

    Raises:
        CachekdError: it can use none of the samples.
    """
    encode = QuestionEncoder(encoder, config.history, blind=False)
    first_good(len(samples), lambda index: encode(samples[index]), config.on_error)


def open_cache(
    config: EvalConfig, samples: Samples | None, models: Iterable[ModelFiles]
) -> tuple[LogitCache, dict[str, str]]:
    """The teacher's logits of the data; and the samples that it lacks, key to why.

    Args:
        samples: None where the data are not opened; then none is looked for.
        models: that are asked.

    Raises:
        CachekdError: it cannot be read, or lacks samples (all of them, where `on_error` is "skip"); or a
            model has another tokenizer, and nobody knows what the cache's tokens stand for.
    """
    cache = open_bound(str(config.cache))
    models, theirs = list(models), cache.manifest.fingerprints.tokenizer
    if any(tokenizer_fingerprint(model.processor.tokenizer) != theirs for model in models):
        vocabulary_of_cache(cache, models, fix=NO_VOCABULARY)
    if samples is None:
        return cache, {}
    missing = missing_samples(cache, samples, config)
    if missing and (config.on_error == "stop" or len(missing) == len(samples)):
        fix = "dump these data; or --on-error skip leaves out what it lacks, if it has others"
        raise missing.error(cache, samples, fix)
    return cache, missing.reasons


def read_prior(config: EvalConfig, progress: Progress) -> tuple[AnswerPrior, int]:
    """Count the training data's answers, no picture of which is opened; records are read as the test data's
    unless they say otherwise.

    Returns:
        the prior, and the number of records that gave it nothing: none of their answers follows a question.

    Raises:
        CachekdError: the data set or a record cannot be read, or no record gave anything.
    """
    assert config.prior_data is not None
    # Neither keys nor pictures matter, and theirs may have other names than the test data's.
    anything = {"key": ROW_NUMBERS, "image_field": (), "image_root": None}
    data = config.prior_data.inheriting_from(config).model_copy(update=anything)
    samples = open_samples(data)
    progress("prior", len(samples), 0, 0)
    seen: list[tuple[str, str]] = []
    nothing = 0
    for index in range(len(samples)):
        found = _answered(samples, index, data.on_error)
        seen += found
        nothing += not found
        progress("prior", len(samples), 1, 0)
    if not seen:
        raise CachekdError(
            "nothing is asked and answered in the data of the prior",
            where=data.data,
            expected="records with a user's turn and an answer to it",
            found=f"{nothing:,} others",
            fix="name the training data, --prior-data; they are read as --data is (--map, --key)",
        )
    return AnswerPrior(seen), nothing
