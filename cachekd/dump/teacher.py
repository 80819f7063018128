"""The teacher as stage one runs it: samples in, what is kept of its logits out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachekd.cache import CodecSettings, OutputHead, TailSetting, TailStates, TeacherInfo, TokenTargets
from cachekd.cache.quantization import QuantizationInfo
from cachekd.cache.topk import select_and_normalise
from cachekd.cache.vocabulary import PackedVocabulary, pack_vocabulary
from cachekd.data import Encoded, SampleEncoder, collate
from cachekd.data.collate import ModelInputs
from cachekd.errors import BadSample, CachekdError
from cachekd.models import ModelFiles, hidden_and_logits_at, output_head, vocabulary_of
from cachekd.models.fitting import FittingBatches
from cachekd.models.memory import OutOfMemory, failed_forward, require_embeddings, together_or_each
from cachekd.models.placement import input_device, output_device

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What the teacher says at a sample's N answer tokens.

    Attributes:
        states: for the tail sketch; None if it is not wanted.
        images: how many the sample has.
        cut: whether the end of its answers was left out.
    """

    key: str
    content_hash: bytes
    targets: TokenTargets
    states: TailStates | None
    images: int
    cut: bool

    def to(self, device: torch.device | str) -> Answer:
        """Move its states to `device`."""
        if self.states is None:
            return self
        moved = TailStates(self.states.hidden.to(device), self.states.log_normaliser.to(device))
        return self._replace(states=moved)


@dataclass(frozen=True)
class Teacher:
    """A frozen VLM, or language model, and what is kept of its logits.

    Attributes:
        files: that it was loaded from; their encoder makes its inputs.
        quantization: how its weights are quantised; None: they are not.
        codec: what is kept.
        head: how its logits follow from its states; None without a tail sketch.
        float32_head: makes the logits in the place of the model's own head; None where that does.
    """

    files: ModelFiles
    model: PreTrainedModel
    codec: CodecSettings
    head: OutputHead | None = None
    quantization: QuantizationInfo | None = None
    float32_head: OutputHead | None = None

    @property
    def encoder(self) -> SampleEncoder:
        """What makes the model's inputs of samples."""
        return self.files.encoder

    @property
    def vocab_size(self) -> int:
        """See `vocabulary_of`."""
        return vocabulary_of(self.model, self.files.processor.tokenizer)

    def vocabulary(self) -> PackedVocabulary | None:
        """What its token ids stand for, as a file; None, with a warning, where that is not known."""
        try:
            return pack_vocabulary(self.files.token_bytes, self.vocab_size)
        except CachekdError as error:
            log.warning("the cache will not say what the teacher's token ids stand for: %s", error)
            return None

    def with_head(self, example: Encoded) -> Teacher:
        """Return the same teacher, its head measured on a sample.

        Raises:
            BadSample: the model cannot run on it.
            CachekdError: the logits do not follow from the states by a matrix, a scale and a cap.
        """
        hidden, logits, _, _ = self.forward([example])
        return replace(self, head=output_head(self.model, hidden, logits, self.vocab_size))

    def in_float32(self) -> Teacher:
        """Return the same teacher, its measured head applied in float32."""
        assert self.head is not None
        head = replace(self.head, in_float32=True)
        return replace(self, head=head, float32_head=head)

    def keeping(self, codec: CodecSettings) -> Teacher:
        """Return the same teacher with another codec; without a head where that has no tail sketch."""
        return replace(self, codec=codec, head=self.head if TailSetting.parse(codec.tail).sketch else None)

    def answers(
        self,
        group: Sequence[Encoded | BadSample],
        batches: FittingBatches,
        known: Mapping[str, Answer] = {},
    ) -> Iterator[Answer | BadSample]:
        """Run a group of samples, batched by length; results in the group's order.

        Args:
            batches: that the samples are run in.
            known: answers from an earlier run of the same group.

        Raises:
            OutOfMemory: as `batches` has it.
        """
        found: dict[int, Answer | BadSample] = {
            index: sample for index, sample in enumerate(group) if isinstance(sample, BadSample)
        }
        usable = [(index, sample) for index, sample in enumerate(group) if not isinstance(sample, BadSample)]

        def run(places: list[int]) -> list[Answer | BadSample]:
            samples = [usable[place][1] for place in places]
            if all(sample.key in known for sample in samples):
                # On the device of new ones: from one device to another products differ in their last bits.
                return [known[sample.key].to(output_device(self.model)) for sample in samples]
            return self.run(samples)

        for places, results in batches.run([len(sample) for _, sample in usable], run):
            found |= zip((usable[place][0] for place in places), results, strict=True)
        return (found[index] for index in range(len(group)))

    def has_room_for(self, samples: list[Encoded]) -> bool:
        """Run a batch to see whether it fits the memory.

        Raises:
            OutOfMemory: it has a single sample, and does not fit.
        """
        try:
            self.run(samples)
        except OutOfMemory:
            if len(samples) == 1:
                raise
            return False
        return True

    @torch.no_grad()  # no inference mode: quantised tensors (quanto's) do not work in it
    def run(self, samples: list[Encoded]) -> list[Answer | BadSample]:
        """One batch; of one that the model cannot run on, sample by sample."""
        return together_or_each(self._run, samples)

    def _run(self, samples: list[Encoded]) -> list[Answer | BadSample]:
        """The answers; of a batch whose logits are not all finite, sample by sample."""
        hidden, logits, token_ids, counts = self.forward(samples)
        logits = logits[:, : self.vocab_size]
        try:
            return self._answers(samples, hidden, logits, token_ids, counts)
        except CachekdError:  # find the sample
            return self._one_by_one(samples, hidden, logits, token_ids, counts)

    def _answers(
        self, samples: list[Encoded], hidden: Tensor, logits: Tensor, token_ids: Tensor, counts: list[int]
    ) -> list[Answer | BadSample]:
        codec = self.codec
        targets, normaliser = select_and_normalise(
            logits,
            token_ids,
            top_k=codec.top_k,
            top_p=codec.top_p,
            window=codec.window,
            min_k=codec.min_k,
        )
        states: list[TailStates | None] = [None] * len(samples)
        if self.head is not None:
            pairs = zip(hidden.split(counts), normaliser.split(counts), strict=True)
            states = [TailStates(*pair) for pair in pairs]
        return [
            Answer(sample.key, sample.content_hash, target, state, sample.images, sample.cut)
            for sample, target, state in zip(samples, targets.split(counts), states, strict=True)
        ]

    def _one_by_one(
        self, samples: list[Encoded], hidden: Tensor, logits: Tensor, token_ids: Tensor, counts: list[int]
    ) -> list[Answer | BadSample]:
        results: list[Answer | BadSample] = []
        parts = zip(hidden.split(counts), logits.split(counts), token_ids.split(counts), strict=True)
        for sample, (states, some, ids) in zip(samples, parts, strict=True):
            try:
                results += self._answers([sample], states, some, ids, [len(ids)])
            except CachekdError as error:
                where = f"sample {sample.key!r}, {error.where}"
                results.append(
                    BadSample(
                        error.problem, where=where, expected=error.expected, found=error.found, fix=error.fix
                    )
                )
        return results

    @torch.no_grad()
    def forward(self, samples: list[Encoded]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Hidden states [N, d], logits [N, V] and ids [N] at the answer tokens, and how many each has.

        Raises:
            BadSample: the model cannot run on them, or on one of them.
            CachekdError: memory ran out, or the GPU failed.
        """
        try:
            return self._forward(samples)
        except CachekdError:
            raise
        except Exception as error:  # torch's, the model's own: each has its own
            raise failed_forward(error, samples, "the teacher", kept=True) from error

    def _forward(self, samples: list[Encoded]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        batch = ModelInputs.of(collate(samples, self.encoder.pad_token_id))
        require_embeddings(self.model, batch.tensors["input_ids"])
        batch = batch.to(input_device(self.model))
        hidden, logits = hidden_and_logits_at(self.model, batch.tensors, batch.positions)
        if self.float32_head is not None:
            logits = self.float32_head.logits(hidden)
        return hidden, logits, batch.token_ids.to(logits.device), batch.counts

    def info(self) -> TeacherInfo:
        """What the manifest says of it."""
        return TeacherInfo(
            name=self.files.path,
            model_type=self.model.config.model_type,
            dtype=str(self.model.dtype).removeprefix("torch."),
            vocab_size=self.vocab_size,
            weights_sha256=self.files.weights,
            config_sha256=self.files.config_sha256,
            quantization=self.quantization,
        )
