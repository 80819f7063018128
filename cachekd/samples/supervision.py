"""Which tokens are the assistant's: spans of the chat template's text to a mask over the model's tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cachekd.errors import BadSample
from cachekd.samples.render import Span
from cachekd.samples.sample import Sample


def answer_numbers(
    tokenizer: Any, input_ids: Tensor, offsets: Tensor, text: str, spans: Sequence[Span], sample: Sample
) -> Tensor:
    """Which tokens are supervised, and in which answer each is.

    It is proven for every sample (under 0.1 ms an answer): decoded, its tokens must give back the text of
    the span.

    Args:
        tokenizer: for the proof.
        input_ids: [L] int64.
        offsets: [L, 2] int64, each token's characters in `text`; empty for tokens that are not from it.
        text: what was tokenised, its images expanded.
        spans: of `text`.
        sample: for error messages.

    Returns:
        [L] int64, the number of the span that a token is in, from 0; -1 for what is not supervised.

    Raises:
        BadSample: a token crosses the border of a span, or the tokens do not give back the text.
    """
    numbers = torch.full((len(input_ids),), -1)
    if not spans:
        return numbers
    (starts, ends), (first, last) = offsets.unbind(1), torch.tensor(spans).T.unsqueeze(2)
    inside = (starts < ends) & (ends > first) & (starts < last)
    for number, token in (inside & ((starts < first) | (ends > last))).nonzero().tolist():
        (start, end), (begin, stop) = spans[number], offsets[token].tolist()
        # White space behind is harmless: some tokenizers let a special token swallow it.
        if begin < start or text[end:stop].strip():
            raise _crossing(text, (begin, stop), (start, end), sample)
    for number, ((start, end), tokens) in enumerate(zip(spans, inside, strict=True)):
        found = tokenizer.decode(
            input_ids[tokens].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if _letters(found) != _letters(text[start:end]):
            raise BadSample(
                "the supervised tokens do not give back the answer",
                where=sample.where,
                expected=text[start:end][:200],
                found=found[:200],
                fix="the tokenizer lacks some of its characters, or the processor changes the text",
            )
        numbers[tokens] = number
    return numbers


def expand_images(
    text: str, spans: Sequence[Span], replacements: Sequence[Mapping[str, Any]], sample: Sample
) -> tuple[str, list[Span]]:
    """What a processor makes of a text whose images are placeholders: row marks, separators, many tokens.

    Args:
        text: from the chat template.
        spans: of it.
        replacements: what the processor replaced, in order (transformers' `text_replacement_offsets`).
        sample: for error messages.

    Returns:
        the text that the processor tokenised, and where in it the spans are.

    Raises:
        BadSample: these are not one replacement an image, or not of this text.
    """
    pieces, last, gains = [], 0, []
    for replaced in replacements:
        start, end = replaced["span"]
        if text[start:end] != replaced["text"]:
            break
        pieces += [text[last:start], replaced["replacement"]]
        last = end
        gains.append((end, len(replaced["replacement"]) - (end - start)))
    if len(gains) != len(sample.images):
        raise BadSample(
            "the processor changes the text beyond the images",
            where=sample.where,
            expected=f"{len(sample.images)} placeholder(s) replaced in the chat template's text",
            found=f"{len(gains)} of {len(replacements)}",
        )
    pieces.append(text[last:])
    shifted = [
        (start + moved, end + moved)
        for start, end in spans
        for moved in [sum(gain for at, gain in gains if at <= start)]
    ]
    return "".join(pieces), shifted


def _crossing(text: str, token: Span, span: Span, sample: Sample) -> BadSample:
    (first, last), (start, end) = token, span
    blank = first < start and not text[first:start].strip() and text[start:last].strip()
    return BadSample(
        "a token crosses the border of an answer",
        where=f"{text[first:last]!r} in {sample.where}",
        expected="tokens that belong to the answer, or do not",
        found=f"{text[first : max(first, start)]!r} before the answer, {text[end:last]!r} behind it",
        fix="end the chat template's generation prompt before this white space"
        if blank
        else "strip white space from the ends of the answer",
    )


def _letters(text: str) -> str:
    """What tokenizers that normalise text, or begin each text with a space, leave as it is."""
    return "".join(unicodedata.normalize("NFKC", text).split())
