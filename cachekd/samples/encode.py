"""Samples to model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cachekd.errors import CachekdError
from cachekd.samples.sample import Sample
from cachekd.samples.supervision import (
    answer_spans,
    drop_trailing_space,
    expand_mask,
    has_generation_marks,
    spans_to_mask,
)


@dataclass(frozen=True)
class Encoded:
    """A sample as model inputs.

    Attributes:
        key: the sample's key.
        content_hash: the sample's 16-byte content hash.
        inputs: what the processor made: `input_ids` [L], and image tensors as the model takes them.
        supervised: [L] bool, true on exactly the assistant's tokens and their end-of-turn tokens.
    """

    key: str
    content_hash: bytes
    inputs: Mapping[str, Tensor]
    supervised: Tensor

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

    Raises:
        CachekdError: the processor has no chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
        if not self.template:
            raise CachekdError(
                "the processor has no chat template, so the answers cannot be located",
                where=str(processor.tokenizer.name_or_path),
                fix="save one as chat_template.jinja beside the processor's files",
            )
        self._marked = has_generation_marks(self.template)

    def __call__(self, sample: Sample) -> Encoded:
        """Encode one sample.

        Raises:
            CachekdError: an answer could not be located, or no token is supervised.
        """
        encode = self._by_generation_marks if self._marked else self._by_prefixes
        inputs, mask = encode(sample)
        supervised = drop_trailing_space(mask, inputs["input_ids"], self.processor.tokenizer)
        runs = int((supervised & ~torch.cat([supervised.new_zeros(1), supervised[:-1]])).sum())
        if runs != len(sample.questions):
            raise CachekdError(
                "the supervised tokens do not match the answers",
                where=f"sample {sample.key!r} in {sample.origin}",
                expected=f"{len(sample.questions)} answer(s)",
                found=f"{runs} supervised span(s)",
                fix="check the {% generation %} marks of the chat template",
            )
        return Encoded(sample.key, sample.content_hash, inputs, supervised)

    def _by_generation_marks(self, sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
        batch = self.processor.apply_chat_template(
            with_images(sample),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        mask = torch.as_tensor(batch.pop("assistant_masks")).flatten().bool()
        return _unbatched(batch), mask

    def _by_prefixes(self, sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
        text, spans = answer_spans(self.processor, sample)
        tokenizer = self.processor.tokenizer
        plain_ids, mask = spans_to_mask(tokenizer, text, spans, sample)
        inputs = _unbatched(
            self.processor(
                text=[text], images=list(sample.images), return_tensors="pt", add_special_tokens=False
            )
        )
        image_token_id = tokenizer.convert_tokens_to_ids(self.processor.image_token)
        expanded = expand_mask(plain_ids, mask, inputs["input_ids"].tolist(), image_token_id, sample)
        return inputs, torch.tensor(expanded)


def with_images(sample: Sample) -> list[dict[str, Any]]:
    """The messages with the images themselves in their image parts, as processors take them."""
    images = iter(sample.images)
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": next(images)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in sample.messages
    ]


_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def _unbatched(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the batch axis of per-token tensors and the all-ones attention mask."""
    return {
        name: value[0] if name in _PER_TOKEN else value
        for name, value in batch.items()
        if name != "attention_mask"
    }


def collate(samples: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """Right-pad samples into one batch.

    Returns:
        `input_ids` [B, S] int64, `attention_mask` [B, S] int64, `supervised` [B, S] bool, and the image
        tensors of all samples concatenated in order.
    """
    pads = {"input_ids": pad_token_id}
    batch: dict[str, Tensor] = {}
    for name in samples[0].inputs:
        values = [sample.inputs[name] for sample in samples]
        if name in _PER_TOKEN:
            batch[name] = pad_sequence(values, batch_first=True, padding_value=pads.get(name, 0))
        else:
            batch[name] = torch.cat(values)
    lengths = [torch.ones(len(sample), dtype=torch.long) for sample in samples]
    batch["attention_mask"] = pad_sequence(lengths, batch_first=True)
    batch["supervised"] = pad_sequence([sample.supervised for sample in samples], batch_first=True)
    return batch


def predicting_positions(supervised: Tensor) -> Tensor:
    """[B, S] bool: the positions whose logits predict the supervised tokens (one to their left)."""
    return torch.cat([supervised[:, 1:], torch.zeros_like(supervised[:, :1])], dim=1)
