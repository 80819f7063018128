"""Which tokens are answers: proven by decoding, a turn's end included."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cachekd.data.processor import Processor
from cachekd.data.render import Span
from cachekd.data.sample import Sample, message_text
from cachekd.errors import BadSample

PALIGEMMA_LAYOUT = "<image>... <bos>{question}\n{answer}<eos>"


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


def is_paligemma(processor: Processor) -> bool:
    """Whether answers go into the processor's suffix; a chat template is not used then."""
    # By its name: importing the class takes a second.
    return any(base.__name__ == "PaliGemmaProcessor" for base in type(processor).__mro__)


def paligemma_inputs(processor: Processor, sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
    """Encode a sample of one question as PaliGemma reads it: images, the question, the answer as a suffix.

    Image and question attend to each other both ways, the answer causally. The token types say which is
    which, and only the processor's `suffix` sets them: an answer written into the text would be seen by the
    question, and so by the tokens that are to predict it.

    Returns:
        what the processor makes of it, with a batch axis of one; and [L] bool, the answer with its end token.

    Raises:
        BadSample: not exactly one question and one answer, no image, or tools; the tokens do not give back
            the answer.
    """
    _check(sample)
    [((question,), answer)] = sample.questions
    text = (processor.image_token or "") * len(sample.images) + message_text(question)
    batch = dict(
        processor(
            text=[text],
            images=[list(sample.images)],
            suffix=[answer],
            return_tensors="pt",
            add_special_tokens=False,
        )
    )
    del batch["labels"]  # the supervised mask says the same
    supervised = batch["token_type_ids"][0] == 1
    written = processor.tokenizer.decode(batch["input_ids"][0][supervised])
    if written != answer + processor.tokenizer.eos_token:
        raise BadSample(
            "the supervised tokens do not give back the answer",
            where=sample.where,
            expected=answer + processor.tokenizer.eos_token,
            found=written,
        )
    return batch, supervised


def paligemma_prompt(processor: Processor, sample: Sample) -> dict[str, Tensor]:
    """Encode images and a question, the answer to which PaliGemma is to write.

    Returns:
        what the processor makes of it, with a batch axis of one.

    Raises:
        BadSample: there is no image, another turn than a user's, or tools.
    """
    roles = [message["role"] for message in sample.messages]
    if roles != ["user"] or not sample.images or sample.tools:
        raise BadSample(
            "PaliGemma takes images and one question",
            where=sample.where,
            expected="a user turn with at least one image",
            found=f"{', '.join(roles)} with {len(sample.images)} image(s)",
        )
    text = (processor.image_token or "") * len(sample.images) + message_text(sample.messages[0])
    batch = dict(
        processor(text=[text], images=[list(sample.images)], return_tensors="pt", add_special_tokens=False)
    )
    batch.pop("labels", None)  # nothing is supervised
    return batch


def _check(sample: Sample) -> None:
    roles = [message["role"] for message in sample.messages]
    if roles != ["user", "assistant"] or not sample.images or sample.tools:
        raise BadSample(
            "PaliGemma takes images, one question and one answer",
            where=sample.where,
            expected="a user turn with at least one image, then an assistant turn",
            found=f"{', '.join(roles)} with {len(sample.images)} image(s)"
            + (f" and {len(sample.tools)} tool(s)" if sample.tools else ""),
            fix="one conversation per question, or a teacher of another family",
        )
