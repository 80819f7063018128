"""Our model as lmms-eval knows one. Importing this needs lmms-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image

from cachekd.config.data import OnError
from cachekd.data import Encoded, Sample
from cachekd.data.batches import BatchLimits
from cachekd.data.images import open_image
from cachekd.data.left_out import may_be_left_out, reason_of
from cachekd.errors import BadSample, CachekdError
from cachekd.lmms.answer import NEW_TOKENS, Answerer, Generation
from cachekd.lmms.obstacles import GENERATION
from cachekd.models import ModelFiles, default_device, dtype_of, limits_of

BATCHES_PER_SORT = 8  # prompts are sorted by length within so many batches
_DEFAULT_UNTIL = "\n\n"  # what lmms-eval adds to tasks that name no end: an answer may have such a line


class Chat(lmms):
    """A run's student, or any other model that cachekd can load.

    Prompts are rendered and tokenised, and their pictures read, as in a dump and in a training. Answers are
    greedy.

    Args:
        pretrained: a folder, or a name on the hub.
        dtype: of torch, or "auto": bfloat16 on a GPU, float32 on a CPU.
        device: of torch; by default the GPU if there is one.
        batch_size: questions in a batch; by default, and where it is no number ("auto"), what `Answerer` has.
    """

    is_simple = False  # it takes conversations

    def __init__(
        self, pretrained: str, dtype: str = "auto", device: str | None = None, batch_size: int | str = 0
    ) -> None:
        where = default_device() if device is None else torch.device(device)
        files = ModelFiles(pretrained)
        files = files.within(limits_of([files.config]))
        model = files.load(dtype=dtype_of(dtype, where), device=where)
        samples = int(batch_size) if str(batch_size).isdecimal() else 0  # "auto" among others
        limits = BatchLimits(samples=samples) if samples else None
        self._begin(Answerer(model, files, limits), "stop", lambda answered: None)

    @classmethod
    def of(cls, answerer: Answerer, on_error: OnError, progress: Callable[[int], None]) -> Chat:
        """Wrap a model that is loaded.

        Args:
            on_error: "skip": a question that the model cannot be asked has the empty answer, and is noted.
            progress: is told how many questions were answered since the last time.
        """
        chat = cls.__new__(cls)
        chat._begin(answerer, on_error, progress)
        return chat

    def _begin(self, answerer: Answerer, on_error: OnError, progress: Callable[[int], None]) -> None:
        super().__init__()
        self._answerer, self._on_error, self._progress = answerer, on_error, progress
        self.device = answerer.model.device
        self.unanswered: dict[str, str] = {}  # question to why

    def clean(self) -> None:
        """Keep the model: lmms-eval's own way drops its weights after one evaluation."""

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer questions, in their order.

        Raises:
            BadSample: a question that the model cannot be asked, where these stop.
            CachekdError: memory runs out for a single question, or the GPU failed.
        """
        answers: dict[int, GenerationResult] = {}
        places = sorted(range(len(requests)), key=lambda place: _alike(requests[place]))
        for _, some in groupby(places, key=lambda place: _alike(requests[place])):
            window = BATCHES_PER_SORT * (self._answerer.batch_limits.samples or BATCHES_PER_SORT)
            whole = list(some)
            for start in range(0, len(whole), window):
                group = whole[start : start + window]
                answers |= zip(group, self._answers([requests[place] for place in group]), strict=True)
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse it.

        Raises:
            CachekdError: always.
        """
        raise _no_generation("the benchmark compares the probabilities of given answers", requests)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse it.

        Raises:
            CachekdError: always.
        """
        raise _no_generation("the benchmark asks in several rounds", requests)

    def _answers(self, requests: Sequence[Instance]) -> Iterator[GenerationResult]:
        settings = _settings(requests[0])
        prompts = [self._prompt(request) for request in requests]
        asked = [prompt for prompt in prompts if isinstance(prompt, Encoded)]
        found = iter(self._answerer.answer(asked, _generation(settings), self._progress))
        for request, prompt in zip(requests, prompts, strict=True):
            answer = prompt if isinstance(prompt, BadSample) else next(found)
            if isinstance(answer, BadSample):
                if not may_be_left_out(answer, self._on_error):
                    raise answer
                self.unanswered[_name(request)] = reason_of(answer)
                yield GenerationResult("", TokenCounts(output_tokens=0))
            else:
                text = _until(answer.text, settings)
                yield GenerationResult(text, TokenCounts(output_tokens=answer.tokens))

    def _prompt(self, request: Instance) -> Encoded | BadSample:
        _, to_messages, _, number, task, split = request.args
        name = _name(request)
        try:
            sample = question(to_messages(self.task_dict[task][split][number]), name)
            return self._answerer.encoder.prompt(_without_placeholders(sample, self._placeholder))
        except BadSample as error:
            return error

    @property
    def _placeholder(self) -> str | None:
        return self._answerer.encoder.processor.image_token


def _no_generation(problem: str, requests: Sequence[Instance]) -> CachekdError:
    """What `lmms-eval --model cachekd` hears; `cachekd eval` has refused such a benchmark before."""
    return CachekdError(
        problem,
        where=requests[0].task_name,
        expected=f"output_type: {GENERATION}",
        fix="choose another benchmark: students are asked to write an answer",
    )


def question(messages: Sequence[Mapping[str, Any]], name: str) -> Sample:
    """A benchmark's question as a sample without an answer.

    Args:
        messages: as lmms-eval's tasks write them: `{"role", "content": [{"type", "text" or "url"}]}`.
        name: of the question, for messages.

    Raises:
        BadSample: it has videos or sound, or a picture that cannot be read.
    """
    images: list[Image.Image] = []
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = []
        for part in parts:
            if part["type"] == "image":
                images.append(open_image(part["url"], where=name))
                kept.append({"type": "image"})
            elif part["type"] == "text":
                kept.append({"type": "text", "text": part["text"]})
            else:
                raise BadSample(
                    "the question is not about pictures", where=name, expected="images", found=part["type"]
                )
        turns.append({"role": message["role"], "content": kept})
    return Sample(name, tuple(images), tuple(turns), origin="the benchmark")


def _without_placeholders(sample: Sample, placeholder: str | None) -> Sample:
    """Some tasks write `<image>` into a question's text, where it would stand for a picture once more."""
    if not placeholder:
        return sample
    turns = tuple(
        {
            **turn,
            "content": [
                {**part, "text": part["text"].replace(placeholder, "")} if part["type"] == "text" else part
                for part in turn["content"]
            ],
        }
        for turn in sample.messages
    )
    return Sample(sample.key, sample.images, turns, sample.origin)


def _name(request: Instance) -> str:
    return f"{request.args[4]}/{request.args[3]}"


def _settings(request: Instance) -> dict[str, Any]:
    settings: dict[str, Any] = request.args[2] or {}
    return settings


def _alike(request: Instance) -> tuple[str, str]:
    """What questions of one batch have in common: the task and how its answers are written."""
    return request.args[4], repr(_settings(request))


def _generation(settings: Mapping[str, Any]) -> Generation:
    return Generation(
        new_tokens=int(settings.get("max_new_tokens") or NEW_TOKENS),
        beams=int(settings.get("num_beams") or 1),
    )


def _until(text: str, settings: Mapping[str, Any]) -> str:
    """Cut an answer at the first of the task's own ends."""
    until = settings.get("until") or []
    for end in [until] if isinstance(until, str) else until:
        if end and end != _DEFAULT_UNTIL:
            text = text.split(end)[0]
    return text
