"""Does the student answer, and how close is it to the teacher?

Each question is asked alone, with its images and without the conversation around it, whose answers could give
this one away. One forward with the true answer in place tells everything: greedy decoding would produce an
answer exactly if, at each of its tokens and at its end, that token is the most probable one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachekd.data_health import DataHealth
from cachekd.data_options import Data, DataOptions
from cachekd.errors import CachekdError
from cachekd.left_out import BadSamples, LeftOutSamples, may_be_left_out
from cachekd.losses import forward_kl_loss
from cachekd.samples import (
    Encoded,
    Sample,
    SampleEncoder,
    Samples,
    collate,
    open_samples,
    predicting_positions,
)
from cachekd.samples.sample import is_supervised
from cachekd.targets import DenseTargets
from cachekd.vlm import (
    check_tokenizers,
    default_device,
    default_dtype,
    limits_of,
    load_config,
    load_model,
    load_processor,
    logits_at,
)

MAX_TYPES = 12
Progress = Callable[[int, int], None]  # samples and questions done since the last call


@dataclass
class Score:
    """One model on one data set.

    Attributes:
        path: the model.
        exact_match: share of questions whose greedy answer is the true one.
        by_type: the same per question type, the first two words of the question.
        top1_agreement: share of answer tokens where model and teacher prefer the same one.
        kl: KL(teacher || model) in nats, mean over the answer tokens.
    """

    path: str
    exact_match: float
    by_type: dict[str, float]
    top1_agreement: float | None = None
    kl: float | None = None


@dataclass
class Evaluation:
    """Models on one data set, the teacher first if there is one.

    Attributes:
        questions: that were asked; of types, how many of each.
        left_out: bad samples, none of whose questions was asked.
    """

    data: str
    questions: int
    types: dict[str, int]
    teacher: Score | None
    models: list[Score] = field(default_factory=list)
    left_out: LeftOutSamples = field(default_factory=LeftOutSamples)


def evaluate(
    models: list[str],
    data: Data,
    *,
    teacher: str | None = None,
    batch_size: int = 128,
    progress: Progress = lambda samples, questions: None,
) -> Evaluation:
    """Score models, and their agreement with a teacher, on every question of a data set.

    Args:
        data: its `on_error` says whether a bad sample ends the evaluation or is left out. With
            `too_long` "cut" a longer one is left out too, as with "skip": half an answer is easier to say.

    Raises:
        CachekdError: bad input, models whose tokenizers differ, or data of which nothing can be used.
    """
    device = default_device()
    paths = [*([teacher] if teacher else []), *models]
    processors = [load_processor(path) for path in paths]
    for processor in processors[1:]:
        check_tokenizers(processors[0].tokenizer, processor.tokenizer)
    data = DataOptions.of(data)
    too_long = "skip" if data.too_long == "cut" else data.too_long
    limits = limits_of(map(load_config, paths), max_tokens=data.max_tokens, too_long=too_long)
    samples, bad = open_samples(data), BadSamples()
    encoder = SampleEncoder(processors[0], limits)
    asked = _asked(samples, encoder, data.on_error, bad)
    loaded = [load_model(path, dtype=default_dtype(device), device=device) for path in paths]

    types, hits = _Counts(), [_Counts() for _ in paths]
    agreed, divergence, tokens = [0.0] * len(paths), [0.0] * len(paths), 0
    seen: set[str] = set()
    while some := list(islice(asked, batch_size)):
        questions, batch, supervised = _batch(some, encoder.pad_token_id, device)
        answers, owner = batch["input_ids"][supervised], supervised.nonzero()[:, 0]
        kinds = [question_type(question) for question in questions]
        types.add(kinds, [1.0] * len(kinds))
        reference: Tensor | None = None
        for index, model in enumerate(loaded):
            logits = _logits(model, batch, supervised, len(processors[0].tokenizer))
            hits[index].add(kinds, _all_correct(logits, answers, owner, len(questions)))
            if teacher and index == 0:
                reference = logits
            elif reference is not None:
                agreed[index] += float((logits.argmax(-1) == reference.argmax(-1)).sum())
                targets = DenseTargets(reference, answers)
                divergence[index] += float(forward_kl_loss(logits, targets, temperature=1.0, reduction="sum"))
        tokens += len(answers)
        progress(len({question.key for question in questions} - seen), len(questions))
        seen |= {question.key for question in questions}

    left_out = LeftOutSamples.of(bad.reasons)
    progress(left_out.samples, 0)
    if not types.total():
        raise CachekdError(
            "no sample can be used",
            where=data.data,
            expected="at least one question",
            found="; ".join(f"{key}: {reason}" for key, reason in islice(left_out.first.items(), 3)),
        )
    scores = [
        Score(path, count.total() / types.total(), count.shares(types))
        for path, count in zip(paths, hits, strict=True)
    ]
    if teacher:
        for index, score in enumerate(scores[1:], 1):
            score.top1_agreement, score.kl = agreed[index] / tokens, divergence[index] / tokens
    first = 1 if teacher else 0
    return Evaluation(
        data=data.data,
        questions=int(types.total()),
        types={name: int(value) for name, value in types.values.items()},
        teacher=scores[0] if teacher else None,
        models=scores[first:],
        left_out=left_out,
    )


def ask_alone(sample: Sample) -> list[Sample]:
    """One sample per question: its system turn, the images and the question, nothing of what came before.

    Between question and answer tools may have been called; these turns are part of what is asked.
    """
    images = [{"type": "image"}] * len(sample.images)
    system = [message for message in sample.messages if message["role"] == "system"]
    asked = []
    for leading, answer in sample.questions:
        turns = [{**turn, "supervised": False} if is_supervised(turn) else turn for turn in leading]
        # An image may stand anywhere in its own question; asked later, the images come first.
        if sum(part["type"] == "image" for turn in turns for part in turn["content"]) != len(images):
            turns = [{**turn, "content": _texts(turn)} for turn in turns]
            turns[0]["content"][:0] = images
        final = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        asked.append(replace(sample, messages=(*system, *turns, final)))
    return asked


def _texts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in turn["content"] if part["type"] == "text"]


def question_type(sample: Sample) -> str:
    """The first two words of the question."""
    text = " ".join(part["text"] for part in _texts(sample.questions[0][0][0]))
    return " ".join(text.lower().split()[:2])


class _Counts:
    """Sums per question type."""

    def __init__(self) -> None:
        self.values: dict[str, float] = defaultdict(float)

    def add(self, kinds: list[str], values: list[float]) -> None:
        for kind, value in zip(kinds, values, strict=True):
            self.values[kind] += value

    def total(self) -> float:
        return sum(self.values.values())

    def shares(self, of: _Counts) -> dict[str, float]:
        """Per type, the most frequent ones first."""
        common = sorted(of.values, key=lambda kind: -of.values[kind])[:MAX_TYPES]
        return {kind: self.values[kind] / of.values[kind] for kind in common}


def _asked(
    samples: Samples, encoder: SampleEncoder, on_error: str, bad: BadSamples
) -> Iterator[tuple[Sample, Encoded]]:
    """Every question of every sample; of a bad sample none, also where only one of them is bad."""
    health = DataHealth(len(samples), samples.__getitem__)
    for index, key in enumerate(samples.keys):
        try:
            questions = [(question, encoder(question)) for question in ask_alone(samples[index])]
        except CachekdError as error:
            if not may_be_left_out(error, on_error):
                raise
            bad.note(key, error)
            health.bad([error])
            continue
        health.good(index)
        yield from questions


def _batch(
    asked: Sequence[tuple[Sample, Encoded]], pad_token_id: int, device: torch.device
) -> tuple[list[Sample], dict[str, Tensor], Tensor]:
    batch = collate([encoded for _, encoded in asked], pad_token_id)
    batch = {name: value.to(device) for name, value in batch.items()}
    return [question for question, _ in asked], batch, batch.pop("supervised")


@torch.inference_mode()
def _logits(model: PreTrainedModel, batch: dict[str, Tensor], supervised: Tensor, vocab_size: int) -> Tensor:
    return logits_at(model, batch, predicting_positions(supervised))[:, :vocab_size].float()


def _all_correct(logits: Tensor, answers: Tensor, owner: Tensor, questions: int) -> list[float]:
    """Per question, 1.0 where every answer token is the most probable one."""
    wrong = (logits.argmax(-1) != answers).float()
    return (torch.zeros(questions, device=wrong.device).index_add(0, owner, wrong) == 0).float().tolist()
