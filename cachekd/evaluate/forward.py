"""Questions through one model, in batches that fit its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachekd.cache.tail.encoder import OutputHead
from cachekd.data import Encoded, SampleEncoder, collate
from cachekd.data.batches import BatchLimits, tokens_like
from cachekd.data.collate import ModelInputs
from cachekd.errors import BadSample, CachekdError
from cachekd.evaluate.comparison import Compared, Comparison, Target
from cachekd.models import hidden_and_logits_at, output_head, vocabulary_of
from cachekd.models.fitting import FittingBatches
from cachekd.models.memory import failed_forward, require_embeddings, together_or_each
from cachekd.models.placement import input_device

LIKE_QUESTIONS = 32


@dataclass(frozen=True)
class Question:
    """A question for a model.

    Attributes:
        encoded: with its answer in place.
        target: what the teacher has of it; None: nothing is compared. Of questions that are run together
            all have one, or none.
    """

    encoded: Encoded
    target: Target | None = None


@dataclass(frozen=True)
class Answered:
    """What a model makes of a question.

    Attributes:
        right: whether greedy decoding would give the true answer, with its end: at each of its tokens the
            most probable one is the true one.
        compared: answer tokens at which model and teacher are compared.
        agreed: those of them where both prefer the same.
        divergence: KL(teacher || model) in nats, summed over them.
        states: [n, d] on the CPU, what the model's head reads at the answer tokens, if these are kept.
    """

    right: bool
    compared: int = 0
    agreed: int = 0
    divergence: float = 0.0
    states: Tensor | None = None


class QuestionRunner:
    """Runs one model.

    Args:
        model: in eval mode, on the device where it runs.
        encoder: the model's.
        comparison: with the teacher, for the questions that have a target.
        keep_states: for the teacher itself, with whom others are compared.
        limits: of a batch; None: LIKE_QUESTIONS times the tokens of the first group's longest question.

    Attributes:
        batches: that questions are run in. They are halved when memory runs out, and stay so.
        head: how the model's logits follow from the states that are kept; None before the first question.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: SampleEncoder,
        *,
        comparison: Comparison | None = None,
        keep_states: bool = False,
        limits: BatchLimits | None = None,
    ) -> None:
        self.model, self.encoder, self.comparison = model, encoder, comparison
        self.keep_states, self._chooses = keep_states, limits is None
        self.batches = FittingBatches(limits or BatchLimits(samples=LIKE_QUESTIONS), halves=True)
        self.head: OutputHead | None = None
        self.vocab_size = vocabulary_of(model, encoder.processor.tokenizer)

    def run(self, questions: Sequence[Question]) -> list[Answered | BadSample]:
        """Batched by length; results in the questions' order.

        Raises:
            CachekdError: memory runs out for a single question, the GPU failed, or the logits do not follow
                from the states.
        """
        lengths = [len(question.encoded) for question in questions]
        if self._chooses and lengths:
            tokens = tokens_like(LIKE_QUESTIONS, max(lengths))
            self.batches, self._chooses = FittingBatches(BatchLimits(tokens=tokens), halves=True), False
        found: dict[int, Answered | BadSample] = {}

        def run(places: list[int]) -> list[Answered | BadSample]:
            return together_or_each(self._tried, [questions[place] for place in places])

        for places, results in self.batches.run(lengths, run):
            found |= zip(places, results, strict=True)
        return [found[index] for index in range(len(questions))]

    def _tried(self, batch: list[Question]) -> list[Answered]:
        try:
            return self._forward(batch)
        except CachekdError:
            raise
        except Exception as error:  # torch's, the model's own: each has its own
            encoded = [one.encoded for one in batch]
            raise failed_forward(error, encoded, self.model.name_or_path, kept=False) from error

    @torch.no_grad()  # no inference mode: quantised tensors (quanto's) do not work in it
    def _forward(self, questions: list[Question]) -> list[Answered]:
        collated = collate([one.encoded for one in questions], self.encoder.pad_token_id)
        require_embeddings(self.model, collated["input_ids"])
        batch = ModelInputs.of(collated).to(input_device(self.model))
        counts = batch.counts
        hidden, logits = hidden_and_logits_at(self.model, batch.tensors, batch.positions)
        logits = logits[:, : self.vocab_size].float()
        if not bool(logits.isfinite().all()):
            raise BadSample(
                f"the logits of {self.model.name_or_path} are not finite",
                where=f"sample {questions[0].encoded.key!r}",
            )
        if self.keep_states and self.head is None:
            instead = "evaluate without --teacher, or with a --cache of these data, dumped with --tail none"
            self.head = output_head(self.model, hidden, logits, self.vocab_size, instead=instead)
        preferred = logits.argmax(-1)
        right = (preferred == batch.token_ids.to(preferred.device)).split(counts)
        compared = [each.split(counts) for each in self._compared(questions, logits, preferred, counts)]
        states = hidden.cpu().split(counts) if self.keep_states else [None] * len(questions)
        return [
            Answered(bool(one.all()), int(there.sum()), int(same.sum()), float(nats.sum()), kept)
            for one, there, same, nats, kept in zip(right, *compared, states, strict=True)
        ]

    def _compared(
        self, questions: list[Question], logits: Tensor, preferred: Tensor, counts: Sequence[int]
    ) -> Compared:
        targets = [one.target for one in questions if one.target is not None]
        if self.comparison is None or not targets:
            return Compared.nothing(logits)
        return self.comparison(targets, logits, preferred, counts)
