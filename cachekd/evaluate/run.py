"""Does the student answer, and how close is it to the teacher?

Each question is asked by itself. One forward with the true answer in place tells everything: greedy decoding
would produce an answer exactly if, at each of its tokens and at its end, that token is the most probable one.

One model is in memory at a time. Of the teacher, which comes first, the final hidden states at the answers
stay, and its head; so a card that holds each model holds the evaluation.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from cachekd.cache.quantization import QuantizationInfo
from cachekd.config import EvalConfig
from cachekd.data import Samples, open_samples
from cachekd.data.batches import limits_said
from cachekd.data.left_out import NAMED, BadSamples, LeftOutSamples
from cachekd.errors import CachekdError
from cachekd.evaluate.ask import Answers, ask
from cachekd.evaluate.comparison import Comparison
from cachekd.evaluate.forward import QuestionRunner
from cachekd.evaluate.inputs import (
    AnswerPrior,
    Progress,
    load_settings_of,
    open_cache,
    open_models,
    read_prior,
    try_encoder,
)
from cachekd.evaluate.questions import AskedSample, QuestionEncoder, question_type, require_single_questions
from cachekd.evaluate.reference import CachedReference, KeptStates, Reference
from cachekd.evaluate.scores import CellCoverage, Evaluation, QuestionSet, Score
from cachekd.models import ModelFiles, default_device, dtype_of
from cachekd.models.device import free_memory
from cachekd.models.fingerprint import tokenizer_fingerprint

Found = dict[str, Answers]  # by a sample's key


def evaluate(
    config: EvalConfig, progress: Progress = lambda what, total, samples, questions: None
) -> Evaluation:
    """Score models, and their agreement with a teacher, on every question of a data set.

    Every model has its own processor, tokenizer and chat template, and reads the true answer in its own
    tokens. `Comparison` says how two of them are compared. A sample that is bad for one of them is left out
    for all, so that they are asked the same questions.

    Raises:
        CachekdError: bad input, or data of which nothing can be used.
    """
    samples, files = open_samples(config), open_models(config)
    interviewer = Interviewer(config, samples, files, progress)
    reference: Reference | None = None
    quantised: QuantizationInfo | None = None  # of the teacher that models are compared with
    if config.cache is not None:
        if config.history == "none":
            require_single_questions(samples)
        cache, missing = open_cache(config, samples, files.values())
        interviewer.bad.add([missing])
        quantised = cache.manifest.teacher.quantization
        reference = CachedReference(cache, interviewer.device, [*files.values()])
    for model in files.values():
        try_encoder(config, samples, model.encoder)
    prior, left_out = (None, 0) if config.prior_data is None else read_prior(config, progress)

    teacher: Found | None = None
    if config.teacher is not None:
        quantised = files[config.teacher].quantization(config.quantization, interviewer.dtype)
        teacher, reference = interviewer.ask_teacher(config.teacher)
    models = [interviewer.ask(path, reference) for path in config.models]

    common = set(samples.keys).intersection(*models, *([] if teacher is None else [teacher]))
    questions = question_set(config, [models[0][key].sample for key in common], interviewer.bad)
    keys = sorted(key for key in common if models[0][key].right)  # about some samples nobody asks anything
    whose = None if reference is None else reference.name
    asked = [models[0][key].sample for key in keys]
    return Evaluation(
        asked=questions,
        dtype=str(interviewer.dtype).removeprefix("torch."),
        teacher=None if teacher is None else _score(str(config.teacher), teacher, keys),
        teacher_quantization=quantised,
        models=[
            _score(path, found, keys, whose, files[path])
            for path, found in zip(config.models, models, strict=True)
        ],
        prior=None if prior is None else _prior_score(config, prior, asked),
        prior_left_out=left_out,
    ).compared()


class Interviewer:
    """Asks one model after the other about the same data; each is in memory for as long as that takes.

    Args:
        files: of each model, by its path.

    Attributes:
        bad: samples that were left out so far; no later model is asked about them.
        dtype: of the models.
    """

    def __init__(
        self,
        config: EvalConfig,
        samples: Samples,
        files: Mapping[str, ModelFiles],
        progress: Progress,
    ) -> None:
        self.config, self.samples, self.files, self.progress = config, samples, files, progress
        self.bad = BadSamples()
        self.device = default_device()
        self.dtype = dtype_of(config.dtype, self.device)

    def ask(self, path: str, reference: Reference | None) -> Found:
        """One model, compared with the teacher if there is one."""
        comparison = None if reference is None else Comparison(reference, self.files[path])
        runner = self._runner(path, comparison=comparison)
        return self._run(runner, path, blind=self.config.blind)

    def ask_teacher(self, path: str) -> tuple[Found, KeptStates | None]:
        """The teacher; and what stays of it, if it was asked anything."""
        runner = self._runner(path, as_teacher=True, keep_states=True)
        found = self._run(runner, path, blind=False)
        if runner.head is None:
            return found, None
        kept = {key: one.kept for key, one in found.items()}
        return found, KeptStates(self.files[path], runner.head, kept)

    def _runner(self, path: str, *, as_teacher: bool = False, **settings: Any) -> QuestionRunner:
        free_memory()  # of the model before
        files, loading = self.files[path], load_settings_of(self.config, as_teacher=as_teacher)
        model = files.load(dtype=self.dtype, device=self.device, **loading)
        limits = limits_said(self.config.batch_size, self.config.batch_tokens)
        return QuestionRunner(model, files.encoder, limits=limits, **settings)

    def _run(self, runner: QuestionRunner, path: str, *, blind: bool) -> Found:
        total = len(self.samples)
        self.progress(path, total, 0, 0)
        encode = QuestionEncoder(
            runner.encoder, self.config.history, blind=blind, rows=self.config.cache is not None
        )
        answers = ask(
            runner,
            self.samples,
            encode,
            self.bad,
            workers=self.config.workers,
            on_error=self.config.on_error,
            progress=lambda samples, questions: self.progress(path, total, samples, questions),
        )
        return {one.sample.key: one for one in answers}


def question_set(config: EvalConfig, samples: Iterable[AskedSample], bad: BadSamples) -> QuestionSet:
    """What was asked.

    Args:
        samples: that no model left out.

    Raises:
        CachekdError: nothing was.
    """
    there = sorted(samples, key=lambda sample: sample.key)
    asked = [sample for sample in there if sample.texts]
    left_out = LeftOutSamples.of(bad.reasons)
    if not asked:
        reasons = [f"{key}: {reason}" for key, reason in islice(left_out.first.items(), 3)]
        raise CachekdError(
            "no sample can be used",
            where=config.data,
            expected="at least one question",
            found="; ".join(reasons) or "no answer that follows a question",
        )
    digest = hashlib.sha256(config.history.encode())
    for sample in asked:
        digest.update(f"\n{sample.key}\t{sample.content_hash.hex()}".encode())
    types = Counter(question_type(text) for sample in asked for text in sample.texts)
    return QuestionSet(
        data=config.data,
        fingerprint=digest.hexdigest(),
        history=config.history,
        questions=types.total(),
        per_sample=[len(sample.texts) for sample in asked],
        types=dict(types.most_common()),
        unasked_answers=sum(sample.unasked_answers for sample in there),
        left_out=left_out,
    )


def _score(
    path: str,
    found: Found,
    keys: list[str],
    agrees_with: str | None = None,
    files: ModelFiles | None = None,
) -> Score:
    """A model's row.

    Args:
        agrees_with: the teacher that it was compared with.
        files: of a model that was.
    """
    answers = [found[key] for key in keys]
    samples, compared = [one.sample for one in answers], sum(one.compared for one in answers)
    score = _counted(path, samples, [right for one in answers for right in one.right])
    if agrees_with is not None:
        score.agrees_with = agrees_with
        if compared:
            score.top1_agreement = sum(one.agreed for one in answers) / compared
            divergence = sum(one.divergence for one in answers)
            score.kl = max(0.0, divergence / compared)  # rounding may leave it below
        if files is not None and any(one.over_cells for one in answers):
            score.over_cells = _coverage(answers, compared, files)
    if any(one.blind is not None for one in answers):
        blind = [one.right if one.blind is None else one.blind for one in answers]
        score.blind = _counted(path, samples, [right for some in blind for right in some])
    return score


def _coverage(answers: Sequence[Answers], compared: int, model: ModelFiles) -> CellCoverage:
    differing = {
        f"{one.sample.key}, question {number + 1}": why
        for one in answers
        for number, why in one.differs.items()
    }
    return CellCoverage(
        tokenizer=tokenizer_fingerprint(model.processor.tokenizer),
        compared=compared,
        tokens=sum(one.tokens for one in answers),
        differing=len(differing),
        first=dict(islice(differing.items(), NAMED)),
    )


def _prior_score(config: EvalConfig, prior: AnswerPrior, samples: Sequence[AskedSample]) -> Score:
    right = [
        prior.answer(text) == answer.strip()
        for sample in samples
        for text, answer in zip(sample.texts, sample.answers, strict=True)
    ]
    assert config.prior_data is not None
    return _counted(config.prior_data.data, samples, right)


def _counted(name: str, samples: Sequence[AskedSample], right: list[bool]) -> Score:
    """Count a row's score, by the rightness of every question."""
    kinds = [question_type(text) for sample in samples for text in sample.texts]
    asked = Counter(kinds)
    hits = Counter(kind for kind, one in zip(kinds, right, strict=True) if one)
    return Score(
        name=name,
        exact_match=sum(right) / len(right),
        by_type={kind: hits[kind] / count for kind, count in asked.most_common()},
        correct="".join("01"[one] for one in right),
    )
