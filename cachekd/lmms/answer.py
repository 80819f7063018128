"""A model's own answers: greedy generation, in batches that fit its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from cachekd.data import Encoded, collate
from cachekd.data.batches import BatchLimits
from cachekd.errors import BadSample, CachekdError
from cachekd.models import ModelFiles
from cachekd.models.fitting import FittingBatches
from cachekd.models.memory import failed_forward, require_embeddings, together_or_each
from cachekd.models.placement import input_device
from cachekd.models.processors import generation_stops

QUESTIONS = 16  # in a batch, unless it is said otherwise: their answers are in memory too
NEW_TOKENS = 1024  # of an answer, where a benchmark does not say how many


@dataclass(frozen=True)
class Generation:
    """How an answer is written. It is always greedy, with no penalty of any kind.

    Attributes:
        new_tokens: most tokens of the answer, its end included.
        beams: of the search; 1: none.
    """

    new_tokens: int = NEW_TOKENS
    beams: int = 1


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: without the token that ended it, nor other special tokens.
        tokens: how many it has.
    """

    text: str
    tokens: int


class Answerer:
    """Has one model answer.

    Args:
        model: in eval mode, on the device where it runs.
        files: the model's.
        limits: of a batch; None: `QUESTIONS`. Halved when memory runs out, and stays so.
    """

    def __init__(self, model: PreTrainedModel, files: ModelFiles, limits: BatchLimits | None = None) -> None:
        self.model, self.encoder = model, files.encoder
        self._batches = FittingBatches(limits or BatchLimits(samples=QUESTIONS), halves=True)
        stops = {*generation_stops(files.path, files.config), self.encoder.end_of_turn}
        self.stops = sorted(token for token in stops if token is not None)
        # A checkpoint's own settings (sampling, Qwen2-VL's repetition penalty) are not greedy decoding.
        model.generation_config = GenerationConfig(
            eos_token_id=self.stops or None, pad_token_id=self.encoder.pad_token_id
        )

    @property
    def batch_limits(self) -> BatchLimits:
        """What a batch holds now, at most."""
        return self._batches.limits

    def answer(
        self,
        prompts: Sequence[Encoded],
        generation: Generation,
        progress: Callable[[int], None] = lambda answered: None,
    ) -> list[Answer | BadSample]:
        """Answer prompts, of `SampleEncoder.prompt`, batched by length; in the prompts' order.

        Args:
            progress: is told how many were answered since the last time.

        Raises:
            CachekdError: memory runs out for a single prompt, or the GPU failed.
        """
        found: dict[int, Answer | BadSample] = {}

        def run(places: list[int]) -> list[Answer | BadSample]:
            batch = [prompts[place] for place in places]
            return together_or_each(lambda some: self._tried(some, generation), batch)

        for places, answers in self._batches.run(list(map(len, prompts)), run):
            found |= zip(places, answers, strict=True)
            progress(len(places))
        return [found[place] for place in range(len(prompts))]

    def _tried(self, batch: list[Encoded], generation: Generation) -> list[Answer]:
        try:
            return self._generated(batch, generation)
        except CachekdError:
            raise
        except Exception as error:  # torch's, the model's own: each has its own
            raise failed_forward(error, batch, self.model.name_or_path, kept=False) from error

    def _room(self, prompt: Encoded, generation: Generation) -> int:
        """The most tokens that an answer may have."""
        context = self.encoder.limits.max_tokens
        room = generation.new_tokens if context is None else min(generation.new_tokens, context - len(prompt))
        if room < 1:
            raise BadSample(
                "the context has no room for an answer",
                where=f"prompt {prompt.key!r}",
                expected=f"fewer than {context:,} tokens",
                found=f"{len(prompt):,} tokens",
            )
        return room

    @torch.no_grad()  # no inference mode: quantised tensors (quanto's) do not work in it
    def _generated(self, batch: list[Encoded], generation: Generation) -> list[Answer]:
        rooms = [self._room(prompt, generation) for prompt in batch]
        room = min(rooms)
        if room < max(rooms) and generation.beams > 1:  # whose search depends on how long answers may be
            return [self._generated([prompt], generation)[0] for prompt in batch]
        collated = collate(batch, self.encoder.pad_token_id, padding_side="left")
        del collated["supervised"]
        require_embeddings(self.model, collated["input_ids"])
        device, dtype = input_device(self.model), self.model.dtype
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in collated.items()
        }
        length = collated["input_ids"].shape[1]
        written = self.model.generate(
            **inputs, max_new_tokens=room, num_beams=generation.beams, do_sample=False
        )
        answers = [self._answer(row) for row in written[:, length:].tolist()]
        # Beside a longer prompt one may write what it may write alone.
        return [
            self._generated([prompt], generation)[0] if answer.tokens == room < own else answer
            for prompt, answer, own in zip(batch, answers, rooms, strict=True)
        ]

    def _answer(self, row: list[int]) -> Answer:
        end = next((place for place, token in enumerate(row) if token in self.stops), len(row))
        text = self.encoder.processor.tokenizer.decode(
            row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Answer(text, end)
