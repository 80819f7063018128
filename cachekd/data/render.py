"""Conversations to text by a chat template, and where in that text the answers stand.

Rendering ever longer prefixes and taking what each turn adds is wrong for templates that write a turn
differently once others follow: Qwen3 removes earlier thinking, Mistral moves the system prompt to the last
question. So a conversation is rendered twice, as it is and with a marker behind each text. The markers taken
out, both must be equal; then a marker's place is where that text ends, whatever stands around it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from cachekd.data.processor import Processor
from cachekd.data.sample import message_text
from cachekd.errors import BadSample, CachekdError

Span = tuple[int, int]  # characters [start, end)
Messages = Sequence[dict[str, Any]]

# A question and an answer, to learn from what a template writes around them.
PROBE: Messages = (
    {"role": "user", "content": [{"type": "text", "text": "question"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "answer"}]},
)
NO_TOOL_TURNS = (
    "use a model whose chat template takes tool turns, or write what the tool said into the user's turn"
)
_PRIVATE_USE = range(0xE000, 0xF900)


class Renderer:
    """Renders conversations.

    Args:
        processor: a transformers processor; its `image_token` is None for a language model.
        source: the template in Jinja.

    Attributes:
        tools: what the assistant may call, in every conversation.

    Raises:
        CachekdError: the template writes today's date.
    """

    tools: Sequence[dict[str, Any]] = ()

    def __init__(self, processor: Processor, source: str) -> None:
        self.processor, self.source = processor, source
        if "strftime_now" in source and "date_string" not in source:
            raise CachekdError(
                "the chat template writes today's date, so a cache would be stale tomorrow",
                where=str(processor.tokenizer.name_or_path),
                fix="put a fixed date in the place of strftime_now(...) in the chat template",
            )

    def with_tools(self, tools: Sequence[dict[str, Any]]) -> Renderer:
        """Make a renderer for conversations with these tools."""
        renderer = copy.copy(self)
        renderer.tools = tools
        return renderer

    def text(self, messages: Messages, *, generation_prompt: bool = False) -> str:
        """The conversation as text, each image being its placeholder."""
        return self._render(messages, self._strings, add_generation_prompt=generation_prompt)[0][0]

    def text_and_marks(self, messages: Messages) -> tuple[str, list[Span]]:
        """Render the text, and tell what of it the template's `{% generation %}` blocks wrote."""
        texts, marks = self._render(messages, self._strings, return_assistant_tokens_mask=True)
        return texts[0], marks[0]

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
        # What is supervised is not the template's to know: some write all that a message holds.
        turns = [{name: turn[name] for name in turn if name != "supervised"} for turn in messages]
        conversation = [self._with_string(turn) if strings else turn for turn in turns]
        # Llama 3 writes today's date unless it is told one; this is its own fallback.
        date = {"date_string": "26 Jul 2024"} if "date_string" in self.source else {}
        rendered: Any = render_jinja_template(
            conversations=[conversation],
            chat_template=self.source,
            tools=list(self.tools) or None,
            **options,
            **date,
            **self.processor.tokenizer.special_tokens_map,
        )
        return rendered

    def _with_string(self, message: dict[str, Any]) -> dict[str, Any]:
        image = (
            f"{self.processor.image_token}\n"  # as LLaVA's data have it: templates of parts write their own
        )
        parts = [image if part["type"] == "image" else part["text"] for part in message["content"]]
        return {**message, "content": "".join(parts)}


def find_answers(renderer: Renderer, messages: Messages, text: str, where: str) -> list[Span]:
    """Find the answers of a conversation in its rendered text.

    Returns:
        where each answer stands, supervised or not: with as much of its leading white space as the template
        keeps, without what trails.

    Raises:
        BadSample: the template drops, rewrites or repeats a turn.
    """
    ends = _ends(renderer, messages, text, where)
    answers = [message_text(turn) for turn in messages if turn["role"] == "assistant"]
    without_lead = ends
    if any(answer != answer.lstrip() for answer in answers):
        stripped = [_lstripped(turn) if turn["role"] == "assistant" else turn for turn in messages]
        without_lead = _ends(renderer, stripped, renderer.text(stripped), where)
    kept = [0, *(end - other for end, other in zip(ends, without_lead, strict=True))]
    spans = []
    for answer, end, (before, after) in zip(answers, ends, pairwise(kept), strict=True):
        left_out = len(answer) - len(answer.lstrip()) - (after - before)
        expected = answer.rstrip()[max(left_out, 0) :]
        if left_out < 0 or not text.endswith(expected, 0, end):
            raise _not_the_same(("assistant", answer), text[:end], where)
        spans.append((end - len(expected), end))
    return spans


def _ends(renderer: Renderer, messages: Messages, text: str, where: str) -> list[int]:
    """Where in `text` each answer ends; proves that every text of every turn is there."""
    marker = _unused_character([text, *map(message_text, messages)])
    marked, owners = _with_markers(messages, marker)
    pieces = re.split(f"{marker}([0-9]+){marker}", renderer.text(marked))
    numbers = [int(piece) for piece in pieces[1::2]]
    if "".join(pieces[::2]) != text:
        raise _not_the_same(None, text, where)
    length, ends = 0, []
    for number, piece in zip(numbers, pieces[::2], strict=False):
        length += len(piece)
        role, core = owners[number]
        if not text.endswith(core, 0, length):
            raise _not_the_same(owners[number], text[:length], where)
        if role == "assistant":
            ends.append((number, length))
    for number, owner in enumerate(owners):
        # What a user says may come twice, as in a title; of an answer it must be clear which one is meant.
        if number not in numbers or (numbers.count(number) > 1 and owner[0] == "assistant"):
            raise _not_the_same(owner, text, where)
    if ends != sorted(ends):
        raise BadSample("the chat template changes the order of the answers", where=where)
    return [end for _, end in ends]


def _with_markers(messages: Messages, marker: str) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The conversation with a numbered marker behind each text, and for each its role and stripped text.

    A marker comes before white space that trails, which a template may strip.
    """
    owners: list[tuple[str, str]] = []
    marked = []
    for message in messages:
        content = []
        for part in message["content"]:
            text = part["text"].rstrip() if part["type"] == "text" else ""
            if text:
                tail = part["text"][len(text) :]
                part = {**part, "text": f"{text}{marker}{len(owners)}{marker}{tail}"}
                owners.append((message["role"], text.lstrip()))
            content.append(part)
        marked.append({**message, "content": content})
    return marked, owners


def _lstripped(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message_text(message).lstrip()}]}


def _unused_character(texts: list[str]) -> str:
    used = set().union(*texts)
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)


def _not_the_same(owner: tuple[str, str] | None, found: str, where: str) -> BadSample:
    return BadSample(
        "the chat template drops, rewrites or repeats a turn",
        where=where,
        expected="the conversation's texts as they are" if owner is None else f"{owner[0]}: {owner[1][:200]}",
        found=found[-300:],
        fix=NO_TOOL_TURNS
        if owner is not None and owner[0] == "tool"
        else "write the data as the template does; where it removes thinking from earlier answers, leave the "
        "thinking out or end conversations at such answers; where it takes no system turn, leave that out",
    )
