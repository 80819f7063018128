"""Conversations to text by a chat template, and where in that text the answers stand.

Rendering ever longer prefixes and taking what each turn adds is wrong for templates that write a turn
differently once others follow: Qwen3 removes earlier thinking, Mistral moves the system prompt to the last
question. So a conversation is rendered twice, as it is and with a marker behind each text. The markers taken
out, both must be equal; then a marker's place is where that text ends, whatever stands around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from cachekd.errors import BadSample, CachekdError
from cachekd.samples.sample import message_text

Span = tuple[int, int]  # characters [start, end)
Messages = Sequence[dict[str, Any]]

# A question and an answer, to learn from what a template writes around them.
PROBE: Messages = (
    {"role": "user", "content": [{"type": "text", "text": "question"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "answer"}]},
)
_PRIVATE_USE = range(0xE000, 0xF900)


class Renderer:
    """Renders conversations.

    Args:
        processor: a transformers processor; its `image_token` is None for a language model.
        source: the template in Jinja.

    Raises:
        CachekdError: the template writes today's date.
    """

    def __init__(self, processor: Any, source: str) -> None:
        self.processor, self.source = processor, source
        if "strftime_now" in source and "date_string" not in source:
            raise CachekdError(
                "the chat template writes today's date, so a cache would be stale tomorrow",
                where=str(processor.tokenizer.name_or_path),
                fix="put a fixed date in the place of strftime_now(...) in the chat template",
            )

    def text(self, messages: Messages, *, generation_prompt: bool = False) -> str:
        """The conversation as text, each image being its placeholder."""
        return self._render(messages, self._strings, add_generation_prompt=generation_prompt)[0][0]

    def marks(self, messages: Messages) -> list[Span]:
        """What the template's `{% generation %}` blocks wrote."""
        return self._render(messages, self._strings, return_assistant_tokens_mask=True)[1][0]

    @cached_property
    def _strings(self) -> bool:
        """Whether the template takes contents as strings, not as lists of parts."""
        if self.processor.image_token is None:
            return True
        try:
            return "{'type'" in self._render(PROBE, strings=False)[0][0]
        except TypeError:  # "user: " + list
            return True

    def _render(
        self, messages: Messages, strings: bool, **options: Any
    ) -> tuple[list[str], list[list[Span]]]:
        conversation = [self._with_string(turn) if strings else turn for turn in messages]
        # Llama 3 writes today's date unless it is told one; this is its own fallback.
        date = {"date_string": "26 Jul 2024"} if "date_string" in self.source else {}
        rendered: Any = render_jinja_template(
            conversations=[conversation],
            chat_template=self.source,
            **options,
            **date,
            **self.processor.tokenizer.special_tokens_map,
        )
        return rendered

    def _with_string(self, message: dict[str, Any]) -> dict[str, Any]:
        image = self.processor.image_token
        parts = [image if part["type"] == "image" else part["text"] for part in message["content"]]
        return {**message, "content": "".join(parts)}


def find_answers(renderer: Renderer, messages: Messages, where: str) -> tuple[str, list[Span]]:
    """Render a conversation and find its answers.

    Returns:
        the text, and where each answer stands in it: with as much of its leading white space as the template
        keeps, without what trails.

    Raises:
        BadSample: the template drops, rewrites or repeats a turn.
    """
    text = renderer.text(messages)
    ends = _ends(renderer, messages, text, where)
    answers = [message_text(turn) for turn in messages if turn["role"] == "assistant"]
    without_lead = ends
    if any(answer != answer.lstrip() for answer in answers):
        stripped = [_lstripped(turn) if turn["role"] == "assistant" else turn for turn in messages]
        without_lead = _ends(renderer, stripped, renderer.text(stripped), where)
    kept = [0, *(end - other for end, other in zip(ends, without_lead, strict=True))]
    spans = []
    for answer, end, (before, after) in zip(answers, ends, pairwise(kept), strict=True):
        lead = len(answer) - len(answer.lstrip()) - (after - before)  # what the template leaves out
        expected = answer.rstrip()[max(lead, 0) :]
        if lead < 0 or text[:end][-len(expected) :] != expected:
            raise _rewritten(answer, text[:end], where)
        spans.append((end - len(expected), end))
    return text, spans


def _ends(renderer: Renderer, messages: Messages, text: str, where: str) -> list[int]:
    """Where in `text` each answer ends; proves that every text of every turn is there."""
    marker = _unused_character([text, *map(message_text, messages)])
    marked, owners = _with_markers(messages, marker)
    pieces = re.split(f"{marker}([0-9]+){marker}", renderer.text(marked))
    numbers = [int(piece) for piece in pieces[1::2]]
    if "".join(pieces[::2]) != text:
        raise BadSample(
            "the chat template rewrites a turn",
            where=where,
            expected="the texts of the conversation as they are, apart from white space around them",
            found=text[-400:],
            fix="change the data or the chat template, so that the model reads what the data say",
        )
    for number, owner in enumerate(owners):
        times = numbers.count(number)
        if times == 0 or (times > 1 and owner["role"] == "assistant"):
            raise BadSample(
                f"the chat template {'repeats' if times else 'drops or rewrites'} a turn",
                where=where,
                expected=f"{owner['role']}: {message_text(owner)[:200]}",
                found=text[-400:],
                fix="a template that removes thinking from earlier answers needs data without it, or "
                "conversations that end at each such answer; one without system turns, data without them",
            )
    length, ends = 0, []
    for number, piece in zip(numbers, pieces[::2], strict=False):
        length += len(piece)
        if owners[number]["role"] == "assistant":
            ends.append((number, length))
    if ends != sorted(ends):
        raise BadSample("the chat template changes the order of the answers", where=where)
    return [end for _, end in ends]


def _with_markers(messages: Messages, marker: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The conversation with its numbered markers, and the turn that each belongs to. A marker comes before
    white space that trails, which a template may strip."""
    owners: list[dict[str, Any]] = []
    marked = []
    for message in messages:
        content = []
        for part in message["content"]:
            text = part["text"].rstrip() if part["type"] == "text" else ""
            if text:
                tail = part["text"][len(text) :]
                part = {**part, "text": f"{text}{marker}{len(owners)}{marker}{tail}"}
                owners.append(message)
            content.append(part)
        marked.append({**message, "content": content})
    return marked, owners


def _lstripped(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message_text(message).lstrip()}]}


def _unused_character(texts: list[str]) -> str:
    used = set().union(*texts)
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)


def _rewritten(answer: str, found: str, where: str) -> BadSample:
    return BadSample(
        "the chat template rewrites an answer",
        where=where,
        expected=answer[:200],
        found=found[-len(answer) - 20 :][-220:],
        fix="write the answers as the template does",
    )
