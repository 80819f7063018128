"""Which tokens are the assistant's: the supervised mask, from the processor's own chat template.

A template with `{% generation %}` marks the answers itself. For any other, transformers would return an
all-zero mask; here the conversation is rendered turn by turn instead, and each assistant turn's span is what
it adds. Either way the spans are characters of the rendered text, mapped to tokens by their offsets. (The
processor's own `return_assistant_tokens_mask` gives the same for marked templates, in quadratic time.)
"""

from __future__ import annotations

import re
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from cachekd.errors import BadSample, CachekdError
from cachekd.samples.sample import Sample

_GENERATION = re.compile(r"\{%-?\s*generation\b")

Spans = list[tuple[int, int]]  # characters [start, end)


def answer_spans(processor: Any, template: str, sample: Sample) -> tuple[str, Spans]:
    """Render a conversation and find the answers in it.

    Returns:
        The rendered text and each answer's span, with its end-of-turn token and without the white space that
        follows.

    Raises:
        BadSample: the spans are not one per answer.
        CachekdError: the template renders turns so that no sample's answers can be located.
    """
    find = _marked_spans if _GENERATION.search(template) else _added_spans
    text, spans = find(processor, template, sample)
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    if len(spans) != len(sample.questions) or any(start >= end for start, end in spans):
        raise BadSample(
            "the supervised text does not match the answers",
            where=sample.where,
            expected=f"{len(sample.questions)} answer(s)",
            found=[text[start:end] for start, end in spans],
            fix="check the {% generation %} marks of the chat template",
        )
    return text, spans


def _marked_spans(processor: Any, template: str, sample: Sample) -> tuple[str, Spans]:
    texts, spans = render_jinja_template(
        conversations=[list(sample.messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    return texts[0], spans[0]


def _added_spans(processor: Any, template: str, sample: Sample) -> tuple[str, Spans]:
    def render(count: int, prompt: bool = False) -> str:
        turns = list(sample.messages[:count])
        return processor.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    whole = render(len(sample.messages))
    spans = []
    for turn, message in enumerate(sample.messages):
        if message["role"] != "assistant":
            continue
        before, after = render(turn, prompt=True), render(turn + 1)
        if not (after.startswith(before) and whole.startswith(after.rstrip())):
            raise CachekdError(
                "the chat template renders earlier turns differently when later ones follow, "
                "so the answers cannot be located",
                where=f"turn {turn} of {sample.where}",
                fix="add {% generation %} ... {% endgeneration %} around the answers in the chat template",
            )
        spans.append((len(before), len(after)))
    return whole, spans


def spans_to_mask(tokenizer: Any, text: str, spans: Spans, sample: Sample) -> tuple[list[int], list[bool]]:
    """Map character spans to tokens.

    Returns:
        token ids [L] of `text` and whether each lies in a span.

    Raises:
        BadSample: a token crosses the border of a span (an answer that begins with a space can merge
            with the newline before it).
    """
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    mask = [False] * len(encoded["input_ids"])
    for position, (start, end) in enumerate(encoded["offset_mapping"]):
        for first, last in spans:
            if start < last and end > first:
                if start < first or end > last:
                    raise BadSample(
                        "a token crosses the border of an answer",
                        where=f"{text[start:end]!r} in {sample.where}",
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
        BadSample: the processor changed the text around the images.
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


def _changed_text(sample: Sample, position: int) -> BadSample:
    return BadSample(
        "the processor's token ids differ from the chat template's beyond the images",
        where=f"{sample.where}, token {position}",
        fix="add {% generation %} ... {% endgeneration %} around the answers in the chat template",
    )


def _find(ids: list[int], run: list[int], start: int, *, last: bool) -> int:
    """Where `run` begins in `ids` after `start`: at the end if it is the last one; `len(ids)` if nowhere."""
    if last:
        return max(start, len(ids) - len(run))
    starts = range(start, len(ids) - len(run) + 1)
    return next((i for i in starts if ids[i : i + len(run)] == run), len(ids))
