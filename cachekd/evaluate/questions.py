"""Turn a conversation into its questions, each to be asked by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image, ImageStat
from torch import Tensor

from cachekd.config.fields import History
from cachekd.data import Encoded, Sample, SampleEncoder, Samples
from cachekd.data.sample import is_supervised, message_text
from cachekd.errors import BadSample, CachekdError

Message = dict[str, Any]


@dataclass(frozen=True)
class AskedSample:
    """A sample's questions, encoded for a model.

    Attributes:
        key, content_hash: the sample's.
        texts, answers: of each question, without pictures.
        encoded: each question with its answer in place, the only one that is supervised.
        blind: the same where every picture has its mean colour; empty where nobody asks for it.
        unasked_answers: supervised answers of the sample that no question asks for.
        numbers: of each of the sample's supervised answers, the question that asks for it; -1: none does.
        rows: [N] int64, the same of each of the sample's answer tokens; None: all answers are asked for, so
            they follow each other.
        whole: whether each question has all that comes before its answer in the sample.
    """

    key: str
    content_hash: bytes
    texts: list[str]
    answers: list[str]
    encoded: list[Encoded]
    blind: list[Encoded]
    unasked_answers: int
    numbers: list[int]
    rows: Tensor | None
    whole: bool

    @property
    def nbytes(self) -> int:
        """The bytes of the model inputs; what several questions share counts once."""
        tensors = {id(x): x for one in (*self.encoded, *self.blind) for x in one.inputs.values()}
        return sum(x.nbytes for x in tensors.values())

    def without_inputs(self) -> AskedSample:
        """What is known of it when it was asked."""
        return replace(self, encoded=[], blind=[])


@dataclass(frozen=True)
class QuestionEncoder:
    """Makes `AskedSample`s; it can be pickled.

    Attributes:
        encoder: the model's.
        history: see `questions_of`.
        blind: whether the questions are to be asked without pictures too.
        rows: whether `AskedSample.rows` is wanted.
    """

    encoder: SampleEncoder
    history: History
    blind: bool
    rows: bool = False

    def __call__(self, sample: Sample) -> AskedSample:
        """Every question of a sample.

        Raises:
            CachekdError: one of them cannot be encoded.
        """
        asked, numbers = questions_of(sample, self.history), _numbers(sample)
        unasked = len(numbers) - len(asked)
        encoded = self._encoded(asked)
        return AskedSample(
            key=sample.key,
            content_hash=sample.content_hash,
            texts=[question_text(question) for question in asked],
            answers=[message_text(question.messages[-1]) for question in asked],
            encoded=encoded,
            blind=self._blind(sample, encoded) if self.blind and sample.images else [],
            unasked_answers=unasked,
            numbers=numbers,
            rows=torch.tensor(numbers)[self.encoder.turns(sample)] if self.rows and unasked else None,
            whole=self.history == "full" or _stand_alone(sample),
        )

    def _encoded(self, asked: list[Sample]) -> list[Encoded]:
        """Questions about the same pictures share them in memory."""
        first: dict[tuple[int, ...], Encoded] = {}
        whole = [self.encoder(question) for question in asked]
        return [
            one.with_pictures_of(first.setdefault(_pictures(question), one))
            for question, one in zip(asked, whole, strict=True)
        ]

    def _blind(self, sample: Sample, encoded: list[Encoded]) -> list[Encoded]:
        """Their text is encoded already."""
        first: dict[tuple[int, ...], Encoded] = {}
        blind = []
        for question, whole in zip(questions_of(blinded(sample), self.history), encoded, strict=True):
            pictures = _pictures(question)
            if pictures not in first:
                first[pictures] = self.encoder(question)
            blind.append(whole.with_pictures_of(first[pictures]))
        return blind


def _numbers(sample: Sample) -> list[int]:
    """Of each supervised answer, in the sample's order, which question asks for it, or -1."""
    asked = {end: number for number, (_, end) in enumerate(sample.asked_at)}
    answers = (place for place, message in enumerate(sample.messages) if is_supervised(message))
    return [asked.get(place, -1) for place in answers]


def questions_of(sample: Sample, history: History = "none") -> list[Sample]:
    """One sample per question, whose only supervised answer is the last message.

    A question has its own turn's pictures; where it has none, those that were shown before. Between question
    and answer tools may have been called; these messages are part of what is asked. System turns that stand
    before the question stay, in their place.

    Args:
        history: "none": nothing else of what came before, whose answers could give this one away; "full": the
            whole conversation up to the question, with its true answers and pictures.
    """
    return [_asked(sample, start, end, history) for start, end in sample.asked_at]


def require_single_questions(samples: Samples) -> None:
    """Refuse conversations whose questions are to be asked alone, of a cache that has the teacher's answers
    within them. No picture is opened but of those that are refused.

    Raises:
        CachekdError: a sample has several questions.
    """
    for index in range(len(samples)):
        try:
            count = len(samples.preview(index).answered)
            # An outline has answers that are not supervised too, about which nobody asks.
            refused = count > 1 and not _stand_alone(samples[index])
        except BadSample:
            continue  # it is told, or left out, when its turn comes
        if refused:
            raise CachekdError(
                "a cache has the teacher's answers within their conversation, not to questions asked alone",
                where=f"sample {samples.keys[index]!r}",
                expected="one question per sample, or history: full",
                found=f"history: none, and {count} questions",
                fix="history: full (--history full) asks each question after those before it; a teacher in "
                "place of the cache answers them alone",
            )


def _stand_alone(sample: Sample) -> bool:
    """Whether nothing but system turns comes before any question: without its history it lacks nothing."""
    before = (message for start, _ in sample.asked_at for message in sample.messages[:start])
    return all(message["role"] == "system" for message in before)


def _asked(sample: Sample, start: int, end: int, history: History) -> Sample:
    before, leading = sample.messages[:start], sample.messages[start:end]
    pictures = iter(sample.images)
    shown = [
        [next(pictures) for part in message["content"] if _is_picture(part)] for message in sample.messages
    ]
    if history == "full":
        kept, images = [*before, *leading], shown[:end]
    else:
        systems = [place for place, message in enumerate(before) if message["role"] == "system"]
        kept = [*(before[place] for place in systems), *leading]
        images = [*(shown[place] for place in systems), *shown[start:end]]
        if not any(images):
            earlier = [picture for some in shown[:start] for picture in some]
            kept[len(systems)] = _with_pictures(kept[len(systems)], len(earlier))
            images = [earlier]
    kept = [{**message, "supervised": False} if is_supervised(message) else message for message in kept]
    flat = tuple(picture for some in images for picture in some)
    return replace(sample, messages=(*kept, sample.messages[end]), images=flat)


def _with_pictures(message: Message, count: int) -> Message:
    return {**message, "content": [{"type": "image"}] * count + message["content"]}


def _is_picture(part: dict[str, Any]) -> bool:
    return bool(part["type"] == "image")


def blinded(sample: Sample) -> Sample:
    """Return the same sample, each picture of the same size and one colour, its mean: nothing can be seen."""
    return replace(sample, images=tuple(map(_mean_colour, sample.images)))


def _mean_colour(image: Image.Image) -> Image.Image:
    red, green, blue = (round(value) for value in ImageStat.Stat(image).mean)
    return Image.new("RGB", image.size, (red, green, blue))


def _pictures(question: Sample) -> tuple[int, ...]:
    return tuple(map(id, question.images))


def question_text(question: Sample) -> str:
    """What the user says in one of `questions_of`, without pictures and with single spaces."""
    [(start, end)] = question.asked_at
    said = [message for message in question.messages[start:end] if message["role"] == "user"]
    return one_line(" ".join(map(message_text, said)))


def one_line(text: str) -> str:
    """Write a text with single spaces."""
    return " ".join(text.split())


def question_type(text: str) -> str:
    """Return the first two words of a question."""
    return " ".join(text.lower().split()[:2])
