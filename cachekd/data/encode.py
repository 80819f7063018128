"""Samples to model inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cachekd.data.chat_template import ChatTemplate
from cachekd.data.limits import NO_LIMITS, Limits
from cachekd.data.processor import Processor
from cachekd.data.sample import Sample
from cachekd.data.supervision import (
    PALIGEMMA_LAYOUT,
    answer_numbers,
    expand_images,
    is_paligemma,
    paligemma_inputs,
    paligemma_prompt,
)
from cachekd.errors import BadSample, CachekdError

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Encoded:
    """A sample as model inputs.

    Attributes:
        key: the sample's key.
        content_hash: the sample's 16-byte content hash.
        inputs: what the processor made: `input_ids` [L], and image tensors as the model takes them.
        supervised: [L] bool, true on exactly the assistant's tokens and their end-of-turn tokens.
        images: how many the sample has.
        cut: whether the end of its answers is left out.
    """

    key: str
    content_hash: bytes
    inputs: Mapping[str, Tensor]
    supervised: Tensor
    images: int = 0
    cut: bool = False

    def up_to(self, answers: int) -> Encoded:
        """The sample up to its n-th answer token, counted from 1, as one that was cut there."""
        kept = int(self.supervised.nonzero()[answers - 1]) + 1
        cut = self.cut or answers < len(self.token_ids)
        return replace(self, inputs=_first(self.inputs, kept), supervised=self.supervised[:kept], cut=cut)

    def with_pictures_of(self, other: Encoded) -> Encoded:
        """Give the text the pictures of another sample, as many and of the same sizes: so the tokens that
        stand for them are the same."""
        pictures = {name: value for name, value in other.inputs.items() if name not in PER_TOKEN}
        return replace(self, inputs={**self.inputs, **pictures})

    def without_pictures(self) -> Encoded:
        """Its text alone, with the places of its images."""
        return replace(self, inputs={name: value for name, value in self.inputs.items() if name in PER_TOKEN})

    @property
    def token_ids(self) -> Tensor:
        """[N] int64, the answer tokens."""
        return self.inputs["input_ids"][self.supervised]

    def __len__(self) -> int:
        return len(self.supervised)


class SampleEncoder:
    """Applies a processor (image processor, tokenizer, chat template) to samples.

    Args:
        processor: a transformers processor with a chat template.
        limits: what the models allow of a sample; by default anything.

    Attributes:
        template: the chat template's source.

    Raises:
        CachekdError: the processor has no chat template or no fast tokenizer, or the template writes today's
            date.
    """

    def __init__(self, processor: Processor, limits: Limits = NO_LIMITS) -> None:
        self.processor, self.limits = processor, limits
        if is_paligemma(processor):
            self.template: str = PALIGEMMA_LAYOUT
            return
        self.template = _template_source(processor)
        self._chat = ChatTemplate(processor, self.template)
        if not processor.tokenizer.is_fast:
            raise CachekdError(
                "the tokenizer does not say which characters its tokens stand for",
                where=str(processor.tokenizer.name_or_path),
                expected="a fast tokenizer (tokenizer.json)",
                found=type(processor.tokenizer).__name__,
            )

    @property
    def pad_token_id(self) -> int:
        """What batches are padded with; where the tokenizer has no such token, any will do: it is masked."""
        tokenizer = self.processor.tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(token_id for token_id in ids if token_id is not None)

    def __call__(self, sample: Sample) -> Encoded:
        """Encode one sample.

        Raises:
            BadSample: an answer cannot be located, the processor or the chat template raised, or the sample
                is beyond the limits.
            CachekdError: the chat template does not let answers be located at all.
        """
        inputs, numbers, cut = self._guarded(sample)
        return Encoded(sample.key, sample.content_hash, inputs, numbers >= 0, len(sample.images), cut)

    def prompt(self, sample: Sample) -> Encoded:
        """Encode a conversation that the model is to go on with: its text ends where an answer begins.

        Raises:
            BadSample: the processor or the chat template raised, or the sample is beyond the limits.
        """
        inputs, numbers, _ = self._guarded(sample, self._prompt)
        return Encoded(sample.key, sample.content_hash, inputs, numbers >= 0, len(sample.images))

    def turns(self, sample: Sample) -> Tensor:
        """[N] int64: for each answer token of a sample, which supervised answer it is in, from 0.

        Raises:
            CachekdError: as for encoding.
        """
        numbers = self._guarded(sample)[1]
        return numbers[numbers >= 0]

    @property
    def image_token_id(self) -> int | None:
        """The placeholder's, which an image is many of; None for a language model."""
        token = self.processor.image_token
        return None if token is None else int(self.processor.tokenizer.convert_tokens_to_ids(token))

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends an answer; None where the chat template writes none.

        Raises:
            CachekdError: answers cannot be found in what the template writes.
        """
        tokenizer = self.processor.tokenizer
        if is_paligemma(self.processor):
            return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        ending = self._chat.frame.ending
        return None if ending is None else int(tokenizer(ending, add_special_tokens=False)["input_ids"][-1])

    def without_limits(self) -> SampleEncoder:
        """Make an encoder of samples as long as they are."""
        return SampleEncoder(self.processor)

    def _guarded(
        self, sample: Sample, encode: Callable[[Sample], tuple[dict[str, Tensor], Tensor]] | None = None
    ) -> tuple[dict[str, Tensor], Tensor, bool]:
        """As `encode`, by default `_encode`, has it, within the limits; and whether the end of the answers is
        cut off."""
        try:
            return self._limited(*(encode or self._encode)(sample), sample)
        except (CachekdError, MemoryError):
            raise
        except Exception as error:  # jinja's, the tokenizer's, the image processor's: each has its own
            raise BadSample(
                "the processor cannot encode the sample",
                where=sample.where,
                found=f"{type(error).__name__}: {error}",
            ) from error

    def _limited(
        self, inputs: dict[str, Tensor], numbers: Tensor, sample: Sample
    ) -> tuple[dict[str, Tensor], Tensor, bool]:
        ids = inputs["input_ids"]
        is_image = ids == (-1 if self.image_token_id is None else self.image_token_id)
        kept = self.limits.tokens_kept(ids, numbers >= 0, is_image, sample)
        self.limits.require_rows(ids[:kept], is_image[:kept], self.processor.tokenizer, sample.where)
        if kept == len(ids):
            return inputs, numbers, False
        return _first(inputs, kept), numbers[:kept], bool((numbers[kept:] >= 0).any())

    def _encode(self, sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs, and [L] the number of the answer that a token is in, or -1."""
        if is_paligemma(self.processor):
            batched, is_answer = paligemma_inputs(self.processor, sample)
            return _unbatched(batched), is_answer.long() - 1
        tokenizer = self.processor.tokenizer
        _refuse_images(self.processor, sample)
        text, spans = self._chat.locate(sample)
        batch = self._processed(
            text, sample, return_offsets_mapping=True, return_text_replacement_offsets=True
        )
        offsets, replaced = batch.pop("offset_mapping")[0], batch.pop("text_replacement_offsets", [[]])
        inputs = _unbatched(batch)
        _refuse_second_bos(tokenizer, inputs["input_ids"], sample)
        text, spans = expand_images(text, spans, replaced[0] if sample.images else [], sample)
        return inputs, answer_numbers(tokenizer, inputs["input_ids"], offsets, text, spans, sample)

    def _prompt(self, sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs of a conversation without an answer to come; no token is one."""
        if is_paligemma(self.processor):
            inputs = _unbatched(paligemma_prompt(self.processor, sample))
        else:
            _refuse_images(self.processor, sample)
            inputs = _unbatched(self._processed(self._chat.prompt(sample), sample))
            _refuse_second_bos(self.processor.tokenizer, inputs["input_ids"], sample)
        return inputs, torch.full((len(inputs["input_ids"]),), -1)

    def _processed(self, text: str, sample: Sample, **options: Any) -> Any:
        return self.processor(
            text=[text],
            # A list of lists: some processors tile the images of one sample in another way than of several.
            images=[list(sample.images)] if sample.images else None,
            return_tensors="pt",
            **options,
            **_special_tokens(self.processor.tokenizer, text),
        )


def _template_source(processor: Processor) -> str:
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):  # several by name, for tools and the like
        template = template.get("default")
    if not template:
        raise CachekdError(
            "the processor has no chat template, so the answers cannot be located",
            where=str(processor.tokenizer.name_or_path),
            fix="save one as chat_template.jinja beside the processor's files",
        )
    return str(template)


def _refuse_images(processor: Processor, sample: Sample) -> None:
    if sample.images and processor.image_token is None:
        raise BadSample(
            "a language model takes no images",
            where=sample.where,
            found=f"{len(sample.images)} image(s)",
            fix="use a vision-language model, or data without images",
        )


def _special_tokens(tokenizer: Any, text: str) -> dict[str, bool]:
    """As the processor's own `apply_chat_template(tokenize=True)` has it: where the template writes no BOS,
    the tokenizer may."""
    written = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return {"add_special_tokens": False} if written else {}


def _refuse_second_bos(tokenizer: Any, input_ids: Tensor, sample: Sample) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and input_ids[:2].tolist() == [bos, bos]:
        raise CachekdError(
            "the chat template and the tokenizer both write a BOS token",
            where=f"{tokenizer.name_or_path}, {sample.where}",
            fix="let the chat template write bos_token before everything else, or not at all",
        )


def _first(inputs: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """The first tokens of a sample, with all of its images."""
    return {name: value[:kept] if name in PER_TOKEN else value for name, value in inputs.items()}


def _unbatched(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the batch axis of per-token tensors and the all-ones attention mask."""
    return {
        name: value[0] if name in PER_TOKEN else value
        for name, value in batch.items()
        if name != "attention_mask"
    }
