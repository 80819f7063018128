"""What a chat template has the assistant say: each answer and its end-of-turn token."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

from jinja2 import TemplateError

from cachekd.data.processor import Processor
from cachekd.data.render import NO_TOOL_TURNS, PROBE, Messages, Renderer, Span, find_answers
from cachekd.data.sample import Sample, is_supervised, message_text
from cachekd.data.turn_fields import KEPT_FIELDS
from cachekd.errors import BadSample, CachekdError

log = logging.getLogger(__name__)

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Frame:
    """What a template writes around an answer.

    Attributes:
        lead_in: white space between the generation prompt and the answer: the model has to generate it.
        ending: from an answer to the end of its end-of-turn token; None where the template writes none.
        control: special tokens with which the template structures a conversation.
    """

    lead_in: str
    ending: str | None
    control: frozenset[str]


class ChatTemplate:
    """Finds what is supervised.

    Args:
        processor: a transformers processor; its `image_token` is None for a language model.
        source: the template in Jinja.

    Raises:
        CachekdError: the template writes today's date.
    """

    def __init__(self, processor: Processor, source: str) -> None:
        self.source = source
        self._tokenizer, self._image_token = processor.tokenizer, processor.image_token
        self._renderer = Renderer(processor, source)
        self._has_marks = _GENERATION.search(source) is not None

    def locate(self, sample: Sample) -> tuple[str, list[Span]]:
        """Render a conversation and find what is supervised.

        Returns:
            the text, and for each supervised answer a span of it: from where the model begins to generate
            (or from the answer's beginning, where a template puts more than white space between) to the end
            of the end-of-turn token. A template's `{% generation %}` marks may widen it.

        Raises:
            BadSample: the template refuses, drops or rewrites a turn, takes no tools, ends this answer in
                another way, or marks something else; or a text contains one of its control tokens.
            CachekdError: answers cannot be found in what this template writes.
        """
        _refuse_control_tokens(sample, self.frame.control)
        renderer = self._renderer.with_tools(sample.tools)
        try:
            if self._has_marks:
                text, written = renderer.text_and_marks(sample.messages)
            else:
                text, written = renderer.text(sample.messages), []
        except TemplateError as error:
            raise _refused(sample, error) from error
        _prove_tools(self._renderer, sample, text)
        answers = find_answers(renderer, sample.messages, text, sample.where)
        turns = [is_supervised(turn) for turn in sample.messages if turn["role"] == "assistant"]
        spans = [self._framed(text, answer, sample.where) for answer in compress(answers, turns)]
        if not self._has_marks:
            return text, spans
        marks = compress(_marked_answers(written, text, answers, sample), turns)
        widened = zip(marks, spans, strict=True)
        return text, [(min(mark[0], span[0]), max(mark[1], span[1])) for mark, span in widened]

    def prompt(self, sample: Sample) -> str:
        """Render a conversation up to where the assistant is to speak.

        Raises:
            BadSample: the template refuses it, or a text contains one of its control tokens.
            CachekdError: answers cannot be found in what this template writes.
        """
        _refuse_control_tokens(sample, self.frame.control)
        try:
            return self._renderer.text(sample.messages, generation_prompt=True)
        except TemplateError as error:
            raise _refused(sample, error) from error

    @cached_property
    def frame(self) -> Frame:
        """Found on a question and an answer of one word each.

        Raises:
            CachekdError: these are not in what the template writes.
        """
        where = f"the chat template of {self._tokenizer.name_or_path}"
        try:
            text = self._renderer.text(PROBE)
            [(start, end)] = find_answers(self._renderer, PROBE, text, where)
        except BadSample as error:
            raise CachekdError(
                "answers cannot be found in what the chat template writes",
                where=where,
                expected=error.expected,
                found=f"{error.problem}: {error.found}",
            ) from None
        prompt = self._renderer.text(PROBE[:1], generation_prompt=True)
        between = text[len(prompt) : start] if text.startswith(prompt) else ""
        ending = self._ending(text[end:])
        if ending is None:
            log.warning(
                "%s writes no end-of-turn token behind an answer: a student does not learn where to stop. "
                "Write %s there.",
                where,
                self._tokenizer.eos_token or "one",
            )
        return Frame(between if between.isspace() else "", ending, self._control(text, ending))

    def _ending(self, rest: str) -> str | None:
        """Cut behind the first token that the tokenizer finds before it splits text. Where there is none, the
        template writes no end-of-turn token: nothing else follows the last answer."""
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        tokens = sorted((token for token in added if token.strip()), key=len, reverse=True)
        found = re.search("|".join(map(re.escape, tokens)), rest) if tokens else None
        return rest[: found.end()] if found else None

    def _control(self, text: str, ending: str | None) -> frozenset[str]:
        # Not all special tokens: the boxes of grounded answers, for one, are part of them.
        named = self._tokenizer.special_tokens_map.values()
        special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        used = [token for token in special if token in named or token in self.source or token in text]
        return frozenset([*used, *filter(None, [self._image_token, (ending or "").strip()])])

    def _framed(self, text: str, answer: Span, where: str) -> Span:
        (start, end), frame = answer, self.frame
        if text[:start].endswith(frame.lead_in):
            start -= len(frame.lead_in)
        if frame.ending is None:
            return start, end
        rest, ending = text[end:].lstrip(), frame.ending.lstrip()
        if not rest.startswith(ending):
            raise BadSample(
                "the chat template does not write its end-of-turn token behind every answer",
                where=where,
                expected=f"{text[start:end][-60:]!r} and {ending!r}",
                found=rest[:60],
                fix="write it behind each answer in the chat template, or use conversations of one answer",
            )
        return start, len(text) - len(rest) + len(ending)


def _refused(sample: Sample, error: TemplateError) -> BadSample:
    roles = [message["role"] for message in sample.messages]
    with_tools = bool(sample.tools) or "tool" in roles
    return BadSample(
        "the chat template refuses the conversation",
        where=sample.where,
        expected="turns in an order and of roles that the template takes",
        found=f"{error}; the roles are {', '.join(roles)}" + (", with tools" if sample.tools else ""),
        fix=NO_TOOL_TURNS if with_tools else "change the data, or use a model whose chat template takes it",
    )


def _prove_tools(plain: Renderer, sample: Sample, text: str) -> None:
    """Tools must change the text, and tool turns must not be written as if somebody else had said them.

    Args:
        plain: the renderer without tools.
        text: with the sample's tools.

    Raises:
        BadSample: the template does not know them.
    """
    if sample.tools and _text_or_none(plain, sample.messages) == text:
        raise BadSample(
            "the chat template takes no tools",
            where=sample.where,
            expected="another text with the sample's tools than without",
            found=f"the same, with {len(sample.tools)} tool(s)",
            fix="use a model whose chat template takes tools, or write them into the system text",
        )
    if all(message["role"] != "tool" for message in sample.messages):
        return
    renderer = plain.with_tools(sample.tools)
    for role in ("user", "assistant"):
        turns = [{**turn, "role": role} if turn["role"] == "tool" else turn for turn in sample.messages]
        if _text_or_none(renderer, turns) == text:
            raise BadSample(
                "the chat template takes no tool turns",
                where=sample.where,
                expected="tool turns that are written as such",
                found=f"it writes them as the {role}'s",
                fix=NO_TOOL_TURNS,
            )


def _text_or_none(renderer: Renderer, messages: Messages) -> str | None:
    try:
        return renderer.text(messages)
    except TemplateError:
        return None


def _marked_answers(written: list[Span], text: str, answers: list[Span], sample: Sample) -> list[Span]:
    """What the template's author marks, which must hold one answer each."""
    marks: list[Span] = []
    for start, end in written:
        if marks and marks[-1][1] == start:  # the end-of-turn token in a block of its own
            start = marks.pop()[0]
        marks.append((start, end))
    marks = [(start, start + len(text[start:end].rstrip())) for start, end in marks]
    if len(marks) != len(answers) or any(
        not (mark[0] <= start and end <= mark[1]) for mark, (start, end) in zip(marks, answers, strict=True)
    ):
        raise BadSample(
            "the supervised text does not match the answers",
            where=sample.where,
            expected=[text[start:end] for start, end in answers],
            found=[text[start:end] for start, end in marks],
            fix="check the {% generation %} marks of the chat template",
        )
    return marks


def _refuse_control_tokens(sample: Sample, control: frozenset[str]) -> None:
    texts = [
        (message["role"], text)
        for message in sample.messages
        for text in (message_text(message), *(message.get(name, "") for name in KEPT_FIELDS))
    ]
    if sample.tools:
        texts.append(("tools", json.dumps(sample.tools, ensure_ascii=False)))
    for role, text in texts:
        found = sorted(token for token in control if token in text)
        if found:
            at = text.index(found[0])
            raise BadSample(
                f"a text contains the control token {found[0]}, which would change the conversation",
                where=sample.where,
                found=f"{role}: {text[max(at - 40, 0) : at + 60]}",
                fix="remove it from the data",
            )
