"""Which tokens are the assistant's: the supervised mask, from the processor's own chat template.

A template with `{% generation %}` marks the answers itself. For any other, transformers would return an
all-zero mask; here the conversation is rendered turn by turn instead, and the character spans that each
assistant turn adds are mapped to tokens.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from cachekd.errors import CachekdError
from cachekd.samples.sample import Sample

_GENERATION = re.compile(r"\{%-?\s*generation\b")


def has_generation_marks(template: str) -> bool:
    """Whether a chat template marks the assistant's tokens with `{% generation %}`."""
    return _GENERATION.search(template) is not None


def answer_spans(processor: Any, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find what each assistant turn adds to it.

    Returns:
        The rendered text and, for each assistant turn, the characters [start, end) of the answer with its
        end-of-turn token and without the white space that follows.

    Raises:
        CachekdError: a prefix of the conversation does not render to a prefix of the text.
    """
    messages = list(sample.messages)
    whole = processor.apply_chat_template(messages, tokenize=False)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = processor.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        after = processor.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not (after.startswith(before) and whole.startswith(after.rstrip())):
            raise CachekdError(
                "the chat template renders earlier turns differently when later ones follow, "
                "so the answers cannot be located",
                where=f"turn {turn} of sample {sample.key!r} in {sample.origin}",
                fix="add {% generation %} ... {% endgeneration %} around the answers in the chat template",
            )
        spans.append((len(before), len(after.rstrip())))
    return whole, spans


def spans_to_mask(
    tokenizer: Any, text: str, spans: list[tuple[int, int]], sample: Sample
) -> tuple[list[int], list[bool]]:
    """Map character spans to tokens.

    Returns:
        token ids [L] of `text` and whether each lies in a span.

    Raises:
        CachekdError: a token crosses the border of a span (an answer that begins with a space can merge
            with the newline before it).
    """
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    mask = [False] * len(encoded["input_ids"])
    for position, (start, end) in enumerate(encoded["offset_mapping"]):
        for first, last in spans:
            if start < last and end > first:
                if start < first or end > last:
                    raise CachekdError(
                        "a token crosses the border of an answer",
                        where=f"{text[start:end]!r} in sample {sample.key!r} of {sample.origin}",
                        fix="strip white space from the ends of the answer",
                    )
                mask[position] = True
    return encoded["input_ids"], mask


def expand_mask(
    plain_ids: list[int], mask: list[bool], input_ids: list[int], image_token_id: int, sample: Sample
) -> list[bool]:
    """Carry a mask from text with one token per image to the processor's ids, where an image is many.

    Everything between two image placeholders must reappear unchanged; what does not belongs to the images.

    Raises:
        CachekdError: the processor changed the text around the images.
    """
    expanded: list[bool] = []
    for index, (token, supervised) in enumerate(zip(plain_ids, mask, strict=True)):
        position = len(expanded)
        if token == image_token_id:
            tail = plain_ids[index + 1 :]
            stop = tail.index(image_token_id) if image_token_id in tail else len(tail)
            block_end = _find(input_ids, tail[:stop], position, last=image_token_id not in tail)
            expanded += [False] * (block_end - position)
        elif position < len(input_ids) and input_ids[position] == token:
            expanded.append(supervised)
        else:
            raise _changed_text(sample, position)
    if len(expanded) != len(input_ids):
        raise _changed_text(sample, len(expanded))
    return expanded


def _changed_text(sample: Sample, position: int) -> CachekdError:
    return CachekdError(
        "the processor's token ids differ from the chat template's beyond the images",
        where=f"sample {sample.key!r} in {sample.origin}, token {position}",
        fix="add {% generation %} ... {% endgeneration %} around the answers in the chat template",
    )


def _find(ids: list[int], run: list[int], start: int, *, last: bool) -> int:
    """Where `run` begins in `ids` after `start`: at the end if it is the last one; `len(ids)` if nowhere."""
    if last:
        return max(start, len(ids) - len(run))
    starts = range(start, len(ids) - len(run) + 1)
    return next((i for i in starts if ids[i : i + len(run)] == run), len(ids))


def drop_trailing_space(mask: Tensor, input_ids: Tensor, tokenizer: Any) -> Tensor:
    """Unmark white-space tokens at the end of each supervised run: templates end a turn with a newline.

    Args:
        mask: [L] bool.
        input_ids: [L] int64.
    """
    mask = mask.clone()
    ends = (mask & ~torch.cat([mask[1:], mask.new_zeros(1)])).nonzero().flatten().tolist()
    for end in ends:
        while end >= 0 and mask[end] and not tokenizer.decode(input_ids[end : end + 1]).strip():
            mask[end] = False
            end -= 1
    return mask
