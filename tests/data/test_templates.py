"""The supervised mask under the chat templates of real families, against texts put together by hand."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from cachekd.data import Sample, SampleEncoder
from cachekd.data.conversation import messages_from_turns
from cachekd.errors import BadSample, CachekdError
from cachekd.models.processors import TextProcessor
from templates import SHAPES, Pairs, Pieces, Shape, shape_processor
from tiny import noise_image

PAIRS: Pairs = [
    ("what is the color?", "red"),
    ("is there a dog?", "no. a large circle"),
    ("describe:", "yes"),
]


def sample_of(turns: list[dict], images: int = 0) -> Sample:
    messages = tuple(messages_from_turns(turns, images, "test"))
    return Sample("k", tuple(noise_image(i) for i in range(images)), messages, "test")


def turns_of(pairs: Pairs, system: str | None = None) -> list[dict]:
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def letters(text: str) -> str:
    return "".join(text.split())


def token_texts(processor, shape: Shape, ids: list[int]) -> list[str]:
    """Each token's characters, from the vocabulary alone (for ASCII texts)."""
    texts = []
    for token in processor.tokenizer.convert_ids_to_tokens(ids):
        text = re.sub("<0x(..)>", lambda byte: chr(int(byte[1], 16)), token)
        text = text.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ")
        texts.append(text + "\n" if token in shape.rstrip else text)
    return texts


def slow_mask(texts: list[str], pieces: Pieces) -> list[bool]:
    """Character by character; every token must lie wholly in supervised pieces or wholly outside."""
    whole = "".join(text for text, _ in pieces)
    tokens = "".join(texts)
    labels = [on for text, on in pieces for _ in text]
    ahead = len(tokens) - len(whole)  # a BOS or a space that the tokenizer puts before the text
    assert tokens[ahead:] == whole
    labels = [False] * ahead + labels
    mask, at = [], 0
    for text in texts:
        part = labels[at : at + len(text)]
        # A special token may swallow the line break behind it; no other token crosses.
        assert len(set(part[: len(text.rstrip()) or 1])) == 1, text
        mask.append(part[0])
        at += len(text)
    return mask


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_the_mask_is_the_hand_built_one(name, count, system):
    shape, processor = SHAPES[name], shape_processor(name)
    images = int(shape.image is not None)
    encoded = SampleEncoder(processor)(sample_of(turns_of(PAIRS[:count], system), images))
    pieces = shape.by_hand(system, PAIRS[:count], (shape.image or "") * 16)
    ids = encoded.inputs["input_ids"].tolist()
    assert encoded.supervised.tolist() == slow_mask(token_texts(processor, shape, ids), pieces)
    assert letters(processor.tokenizer.decode(encoded.token_ids)) == letters(
        "".join(text for text, on in pieces if on)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_inputs_are_those_of_apply_chat_template(name):
    """Above all BOS: written by the template, put there by the tokenizer, or absent; never twice."""
    shape, processor = SHAPES[name], shape_processor(name)
    images = int(shape.image is not None)
    sample = sample_of(turns_of(PAIRS), images)
    encoded = SampleEncoder(processor)(sample)
    if images:
        messages = [dict(message) for message in sample.messages]
        messages[0]["content"] = [{"type": "image", "image": sample.images[0]}, *messages[0]["content"][1:]]
        if name == "vicuna":  # contents are strings
            for message in messages:
                parts = ("<image>\n" if p["type"] == "image" else p["text"] for p in message["content"])
                message["content"] = "".join(parts)
            text = processor.apply_chat_template(messages, tokenize=False)
            theirs = processor(text=text, images=list(sample.images), return_tensors="pt")
        else:
            theirs = processor.apply_chat_template(
                [messages], tokenize=True, return_dict=True, return_tensors="pt"
            )
        assert torch.equal(theirs["pixel_values"], encoded.inputs["pixel_values"])
    else:
        theirs = processor.tokenizer.apply_chat_template(
            [turns_of(PAIRS)], tokenize=True, return_dict=True, return_tensors="pt"
        )
    ids = encoded.inputs["input_ids"]
    assert theirs["input_ids"][0].tolist() == ids.tolist()
    bos = processor.tokenizer.bos_token_id
    assert ids.tolist().count(bos) == (0 if bos is None else 1)


def test_thinking_is_kept_in_the_last_answer_and_refused_where_the_template_removes_it():
    processor = shape_processor("qwen3")
    encoder = SampleEncoder(processor)
    thought = "<think>\na dog\n</think>\n\nyes"
    encoded = encoder(sample_of(turns_of([PAIRS[0], ("is there a dog?", thought)])))
    assert processor.tokenizer.decode(encoded.token_ids) == f"red<|im_end|>{thought}<|im_end|>"
    with pytest.raises(BadSample, match="drops, rewrites or repeats") as caught:
        encoder(sample_of(turns_of([("is there a dog?", thought), PAIRS[0]])))
    assert "removes thinking from earlier answers" in str(caught.value)
    with pytest.raises(BadSample, match="drops, rewrites"):  # other white space than the template's
        encoder(sample_of(turns_of([("is there a dog?", "<think>a dog</think>yes")])))


def plain(body: str) -> str:
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
        + body
        + "<|im_end|>\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
        + "{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


FAITHFUL = plain("{{ m['content'] }}")
EOS_AT_THE_END = FAITHFUL.replace("{{ m['content'] }}<|im_end|>", "{{ m['content'] }}", 1) + "{{ eos_token }}"
ADVERSARIAL = {
    "upper case": (plain("{{ m['content'] | upper }}"), "answers cannot be found"),
    "cut off": (plain("{{ m['content'][:8] }}"), "answers cannot be found"),
    "twice": (plain("{{ m['content'] }} ({{ m['content'] }})"), "answers cannot be found"),
    "backwards": (FAITHFUL.replace("in messages", "in messages | reverse"), "changes the order"),
    "without the system turn": (
        FAITHFUL.replace("messages %}", "messages | rejectattr('role', 'equalto', 'system') %}"),
        "drops, rewrites or repeats",
    ),
    "another question": (
        FAITHFUL.replace("{{ m['content'] }}<", "{{ m['content'] | replace('dog', 'cat') }}<"),
        "",
    ),
    "ended once": (EOS_AT_THE_END, "does not write its end-of-turn token behind every answer"),
    "only without an assistant": (
        FAITHFUL + "{{ raise_exception('no ' + messages[-1]['role']) }}",
        "no assistant",
    ),
    "words around": (plain("{{ 'a' + m['content'] | replace('e', 'é') }}"), "answers cannot be found"),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_template_that_says_something_else_is_refused(name):
    template, message = ADVERSARIAL[name]
    encoder = SampleEncoder(shape_processor("qwen3", template))
    with pytest.raises(CachekdError, match=message or "drops, rewrites or repeats") as caught:
        encoder(sample_of(turns_of(PAIRS, "Be brief.")))
    assert "test" in str(caught.value) or "chat template" in str(caught.value)


def test_the_adversarial_templates_differ_from_one_that_is_taken():
    encoded = SampleEncoder(shape_processor("qwen3", FAITHFUL))(sample_of(turns_of(PAIRS, "Be brief.")))
    assert int((encoded.token_ids == encoded.token_ids[-1]).sum()) == 3
    # One answer, ended once, is ended.
    single = SampleEncoder(shape_processor("qwen3", EOS_AT_THE_END))(sample_of(turns_of(PAIRS[:1])))
    assert single.supervised.any()


def test_a_generation_prompt_that_ends_in_a_space_is_refused_where_the_space_merges():
    template = SHAPES["mistral"].template.replace("[/INST]'", "[/INST] '").replace("' ' + message", "message")
    encoder = SampleEncoder(shape_processor("mistral", template))
    with pytest.raises(BadSample, match="crosses the border") as caught:
        encoder(sample_of(turns_of([("is there?", "yes")])))
    assert "end the chat template's generation prompt before this white space" in str(caught.value)


def test_a_template_with_todays_date_is_refused_or_gets_a_fixed_one():
    dated = "{{ strftime_now('%d %b %Y') }}" + FAITHFUL
    with pytest.raises(CachekdError, match="today's date"):
        SampleEncoder(shape_processor("qwen3", dated))
    llama = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    processor = shape_processor("qwen3", llama + "{{ date_string }}\n" + FAITHFUL)
    encoded = SampleEncoder(processor)(sample_of(turns_of(PAIRS)))
    assert processor.tokenizer.decode(encoded.inputs["input_ids"]).startswith("26 Jul 2024\n")


def test_a_second_bos_is_refused():
    """The text does not begin with BOS, but the token swallows what is before it."""
    template = "{{ bos_token }}" + SHAPES["llava15"].template
    processor = shape_processor("llava15", template)
    ids = SampleEncoder(processor)(sample_of(turns_of(PAIRS), 1)).inputs["input_ids"]
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1
    processor = shape_processor("llava15", "{{ '\\n' }}" + template)
    processor.tokenizer.add_tokens([AddedToken("<s>", lstrip=True, special=True)], special_tokens=True)
    with pytest.raises(CachekdError, match="both write a BOS"):
        SampleEncoder(processor)(sample_of(turns_of(PAIRS), 1))


def test_a_template_without_an_end_of_turn_token_is_named(caplog):
    encoder = SampleEncoder(shape_processor("llava15"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            encoder(sample_of(turns_of(PAIRS), 1))
    assert [record.message for record in caplog.records if "no end-of-turn token" in record.message][1:] == []
    assert "Write </s> there" in caplog.text
    caplog.clear()
    SampleEncoder(shape_processor("vicuna"))(sample_of(turns_of(PAIRS), 1))
    assert "end-of-turn" not in caplog.text


def test_marks_without_the_end_of_turn_token_are_widened_to_it():
    marked = plain("{% generation %}{{ m['content'] }}{% endgeneration %}")
    both = [
        SampleEncoder(shape_processor("qwen3", template))(sample_of(turns_of(PAIRS)))
        for template in (marked, FAITHFUL)
    ]
    assert torch.equal(both[0].supervised, both[1].supervised)


def test_marks_may_hold_more_than_the_answer():
    """The template's author decides what is supervised beside it, as an empty thinking block."""
    marked = plain("{% generation %}<think>\n\n</think>\n\n{{ m['content'] }}<|im_end|>\n{% endgeneration %}")
    processor = shape_processor(
        "qwen3", marked.replace("{% endgeneration %}<|im_end|>\n", "{% endgeneration %}")
    )
    encoded = SampleEncoder(processor)(sample_of(turns_of(PAIRS[:1])))
    assert processor.tokenizer.decode(encoded.token_ids) == "<think>\n\n</think>\n\nred<|im_end|>"


def test_named_templates_and_slow_tokenizers():
    processor = shape_processor("qwen3")
    processor.tokenizer.chat_template = {"default": FAITHFUL, "tool_use": "{{ 'x' }}"}
    assert SampleEncoder(processor).template == FAITHFUL
    processor.tokenizer.chat_template = {"tool_use": "{{ 'x' }}"}
    with pytest.raises(CachekdError, match="no chat template"):
        SampleEncoder(processor)


# ---- random conversations

CONTROL_LIKE = ["<image>", "<|im_end|>", "</s>", "<s>", "<end_of_turn>", "<|eot_id|>", "<think>", "</think>"]
SPACES = st.text(" \n\t\u2003", max_size=3)
WORDS = st.one_of(st.text(max_size=12), st.text(max_size=12), st.sampled_from(CONTROL_LIKE))
TEXTS = st.tuples(SPACES, st.lists(WORDS, min_size=1, max_size=3), SPACES).map(
    lambda parts: parts[0] + " ".join(parts[1]) + parts[2]
)
EOT = {name: shape.end or "" for name, shape in SHAPES.items()}
ENCODERS: dict[str, SampleEncoder] = {}


def encoder_of(name: str) -> SampleEncoder:
    if name not in ENCODERS:
        ENCODERS[name] = SampleEncoder(shape_processor(name))
    return ENCODERS[name]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(SHAPES)),
    pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
    system=TEXTS,
)
def test_random_conversations_are_right_or_refused(name, pairs, system):
    encoder = encoder_of(name)
    turns = turns_of(pairs, system)
    try:
        sample = sample_of(turns)
    except BadSample:  # a placeholder without an image, an empty answer
        assert "<image>" in str(turns) or any(not answer.strip() for _, answer in pairs)
        return
    texts = [system, *(text for pair in pairs for text in pair)]
    try:
        encoded = encoder(sample)
    except BadSample:
        control = any(token in text for token in encoder._chat.frame.control for text in texts)
        thinking = name == "qwen3" and any("think>" in text for text in texts)
        blank = any(text != text.strip() for text in texts) or any(not text.strip() for text in texts)
        assert control or thinking or blank
        return
    expected = "".join(letters(answer) + EOT[name] for _, answer in pairs)
    assert letters(encoder.processor.tokenizer.decode(encoded.token_ids)) == expected
    if not isinstance(encoder.processor, TextProcessor):
        return
    rendered = encoder.processor.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
    assert encoded.inputs["input_ids"].tolist() == rendered["input_ids"]
