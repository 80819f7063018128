"""Does the student answer, and how close is it to the teacher?

Each question is asked by itself. One forward with the true answer in place tells everything: greedy decoding
would produce an answer exactly if, at each of its tokens and at its end, that token is the most probable one.

One model is in memory at a time. Of the teacher, which comes first, the final hidden states at the answers
stay, and its head; so a card that holds each model holds the evaluation.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice

import torch

from cachekd.cache import LogitCache
from cachekd.config import EvalConfig
from cachekd.errors import CachekdError
from cachekd.evaluation.ask import Answers, ask
from cachekd.evaluation.forward import QuestionRunner
from cachekd.evaluation.prior import AnswerPrior
from cachekd.evaluation.questions import AskedSample, QuestionEncoder, question_type
from cachekd.evaluation.reference import CachedReference, KeptStates, Reference
from cachekd.evaluation.scores import Evaluation, QuestionSet, Score
from cachekd.failures import free_memory
from cachekd.fingerprint import tokenizer_fingerprint
from cachekd.left_out import BadSamples, LeftOutSamples
from cachekd.samples import SampleEncoder, Samples, open_samples
from cachekd.vlm import (
    check_tokenizers,
    default_device,
    default_dtype,
    limits_of,
    load_config,
    load_model,
    load_processor,
)

MAX_TYPES = 12
Progress = Callable[[str, int, int, int], None]
"""The model that is asked, the samples in all; samples and questions since the last call."""

Found = dict[str, Answers]  # by a sample's key


def evaluate(
    config: EvalConfig, progress: Progress = lambda model, total, samples, questions: None
) -> Evaluation:
    """Score models, and their agreement with a teacher, on every question of a data set.

    Every model has its own processor and chat template. Answers are compared by their tokens, so all models
    have one tokenizer. A sample that is bad for one of them is left out for all: they are asked the same.

    Raises:
        CachekdError: bad input, models whose tokenizers differ, or data of which nothing can be used.
    """
    samples, encoders, device = open_samples(config), open_encoders(config), default_device()
    prior = (
        None if config.prior_data is None else AnswerPrior.of(open_samples(config.prior_data.beside(config)))
    )
    reference: Reference | None = None
    if config.cache is not None:
        reference = CachedReference(open_cache(config.cache, encoders), device)
    bad = BadSamples()
    asked = partial(_ask, config, samples, encoders, bad, progress)
    teacher: Found = {}
    if config.teacher is not None:
        teacher, reference = asked(config.teacher, None, is_teacher=True)
    models = [asked(path, reference)[0] for path in config.models]

    common = set(samples.keys).intersection(*models, *([teacher] if config.teacher else []))
    keys = sorted(key for key in common if models[0][key].right)  # about some samples nobody asks anything
    questions = question_set(config, [models[0][key].sample for key in keys], bad)
    rows = [_score(path, found, keys, reference) for path, found in zip(config.models, models, strict=True)]
    return Evaluation(
        asked=questions,
        teacher=None if config.teacher is None else _score(config.teacher, teacher, keys, None),
        models=rows,
        prior=None if prior is None else _prior_score(config, prior, [models[0][key].sample for key in keys]),
    ).compared()


def open_encoders(config: EvalConfig) -> dict[str, SampleEncoder]:
    """Each model's own, by its path; the limits are those of all.

    Raises:
        CachekdError: a model cannot be found, or their tokenizers differ.
    """
    paths = dict.fromkeys([*([config.teacher] if config.teacher else []), *config.models])
    # Half an answer is easier to say: a longer sample is left out where a dump would cut it.
    too_long = "skip" if config.too_long == "cut" else config.too_long
    limits = limits_of(map(load_config, paths), max_tokens=config.max_tokens, too_long=too_long)
    encoders = {path: SampleEncoder(load_processor(path), limits) for path in paths}
    first, *others = encoders.values()
    for other in others:
        check_tokenizers(first.processor.tokenizer, other.processor.tokenizer)
    return encoders


def open_cache(path: str, encoders: Mapping[str, SampleEncoder]) -> LogitCache:
    """The teacher's logits of the data.

    Raises:
        CachekdError: it cannot be read, or is of another tokenizer than the models'.
    """
    cache = LogitCache(path)
    name, encoder = next(iter(encoders.items()))
    ours, theirs = tokenizer_fingerprint(encoder.processor.tokenizer), cache.manifest.fingerprints.tokenizer
    if ours != theirs:
        raise CachekdError(
            "the cache was made with a different tokenizer than the models'",
            where=f"{cache.path} and {name}",
            expected=f"sha256 {theirs}",
            found=f"sha256 {ours}",
            fix="evaluate without --cache, or dump the data with a teacher of this tokenizer",
        )
    return cache


def _ask(
    config: EvalConfig,
    samples: Samples,
    encoders: Mapping[str, SampleEncoder],
    bad: BadSamples,
    progress: Progress,
    path: str,
    reference: Reference | None,
    *,
    is_teacher: bool = False,
) -> tuple[Found, Reference | None]:
    """One model, in memory for as long as this takes; of a teacher its own reference."""
    device, encoder = default_device(), encoders[path]
    dtype = default_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    runner = QuestionRunner(
        load_model(path, dtype=dtype, device=device),
        encoder,
        reference=reference,
        keep_states=is_teacher,
        batch_size=config.batch_size,
    )
    progress(path, len(samples), 0, 0)
    answers = ask(
        runner,
        samples,
        QuestionEncoder(encoder, config.history, blind=config.blind and not is_teacher),
        bad,
        workers=config.workers,
        on_error=config.on_error,
        progress=lambda done, questions: progress(path, len(samples), done, questions),
    )
    found = {one.sample.key: one for one in answers}
    head = runner.head
    del runner, answers
    free_memory()
    if head is not None:
        reference = KeptStates(head, {key: one.states for key, one in found.items()})
    return found, reference


def question_set(config: EvalConfig, samples: Sequence[AskedSample], bad: BadSamples) -> QuestionSet:
    """What was asked.

    Args:
        samples: those whose questions were, in the order of their keys.

    Raises:
        CachekdError: nothing was.
    """
    left_out = LeftOutSamples.of(bad.reasons)
    if not samples:
        reasons = [f"{key}: {reason}" for key, reason in islice(left_out.first.items(), 3)]
        raise CachekdError(
            "no sample can be used",
            where=config.data,
            expected="at least one question",
            found="; ".join(reasons) or "no answer that follows a question",
        )
    digest = hashlib.sha256(config.history.encode())
    for sample in samples:
        digest.update(f"\n{sample.key}\t{sample.content_hash.hex()}".encode())
    types = Counter(question_type(text) for sample in samples for text in sample.texts)
    return QuestionSet(
        data=config.data,
        fingerprint=digest.hexdigest(),
        history=config.history,
        questions=types.total(),
        per_sample=[len(sample.texts) for sample in samples],
        types=dict(types.most_common()),
        answers_to_nobody=sum(sample.answers_to_nobody for sample in samples),
        left_out=left_out,
    )


def _score(path: str, found: Found, keys: list[str], reference: Reference | None) -> Score:
    answers = [found[key] for key in keys]
    samples, tokens = [one.sample for one in answers], sum(one.tokens for one in answers)
    score = _counted(path, samples, [right for one in answers for right in one.right])
    if reference is not None:
        score.top1_agreement = sum(one.agreed for one in answers) / tokens
        score.kl = max(0.0, sum(one.divergence for one in answers) / tokens)  # rounding may leave it below
    if any(one.blind is not None for one in answers):
        blind = [one.right if one.blind is None else one.blind for one in answers]
        score.blind = _counted(path, samples, [right for some in blind for right in some])
    return score


def _prior_score(config: EvalConfig, prior: AnswerPrior, samples: Sequence[AskedSample]) -> Score:
    right = [
        prior.answer(text) == answer.strip()
        for sample in samples
        for text, answer in zip(sample.texts, sample.answers, strict=True)
    ]
    assert config.prior_data is not None
    return _counted(config.prior_data.data, samples, right)


def _counted(name: str, samples: Sequence[AskedSample], right: list[bool]) -> Score:
    """A row, by the rightness of every question."""
    kinds = [question_type(text) for sample in samples for text in sample.texts]
    asked = Counter(kinds)
    hits = Counter(kind for kind, one in zip(kinds, right, strict=True) if one)
    return Score(
        name=name,
        exact_match=sum(right) / len(right),
        by_type={kind: hits[kind] / count for kind, count in asked.most_common(MAX_TYPES)},
        correct="".join("01"[one] for one in right),
    )
