"""A record's fields are heeded or refused: image indices, what is supervised, system texts and tools."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.data import Sample, SampleEncoder, open_samples, sample_from_record
from cachekd.data.preview import preview_of_record
from cachekd.data.record_form import LlavaTurn, Message
from cachekd.data.sample import is_supervised
from cachekd.data.turn_fields import SUPERVISION_FIELDS
from cachekd.errors import BadSample
from cachekd.evaluate.questions import questions_of
from cachekd.export import export_webdataset
from cachekd_cli.main import app
from caches import dump_cache
from schema_files import schema, valid
from templates import CHATML, QWEN_SYSTEM, SHAPES, shape_processor
from tiny import PLAIN_TEMPLATE, conversation, noise_image, save_vlm, tiny_processor
from tiny_families import FAMILIES

PICTURES = [noise_image(seed) for seed in range(4)]
USER = {"role": "user", "content": "what?"}
ANSWER = {"role": "assistant", "content": "red"}


def read(record: dict[str, Any], **options: Any) -> Sample:
    return sample_from_record("k", record, origin="test", **options)


def refused(record: dict[str, Any], message: str, **options: Any) -> str:
    with pytest.raises(BadSample, match=message) as caught:
        read(record, **options)
    assert "'k' in test" in str(caught.value)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


def encoded_text(processor: Any, sample: Sample) -> tuple[str, str]:
    """What a sample becomes, and what of it is supervised."""
    encoded = SampleEncoder(processor)(sample)
    decode = processor.tokenizer.decode
    return decode(encoded.inputs["input_ids"]), decode(encoded.token_ids)


# ---- image parts with an index


def asking(*parts: Any) -> list[dict[str, Any]]:
    """A question of these parts: an index, None for a part without one, or a text."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "index": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}, ANSWER]


def test_an_index_says_which_image_it_is():
    swapped = read({"images": PICTURES[:2], "messages": asking(1, "left of", 0)})
    plain = read({"images": PICTURES[1::-1], "messages": asking(None, "left of", None)})
    assert swapped.content_hash == plain.content_hash
    assert swapped.images[0].tobytes() == PICTURES[1].tobytes()
    again = read({"images": PICTURES[:2], "messages": asking(1, 0, 1)})
    assert [image.tobytes() for image in again.images] == [PICTURES[i].tobytes() for i in (1, 0, 1)]
    assert preview_of_record({"images": ["a", "b"], "messages": asking(1, 0, 1)}).images == 3


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((7, 0), "no index, or one that is not an image's"),
        ((-1, 0), "not an image's"),
        ((True, 0), "not an image's"),
        (("1", 0.0), "not an image's"),
        ((1, None), "no index"),
        ((1, "and <image>", 0), "no index"),
        ((1, 1), "named by no part"),
        ((0,), "named by no part"),
    ],
)
def test_an_index_that_names_no_image_is_refused(parts, message):
    turns = asking(*parts)
    if parts[0] == "1":
        turns[0]["content"] = [{"type": "image", "index": part} for part in parts]
    refused({"images": PICTURES[:2], "messages": turns}, message)


def test_an_index_is_refused_where_it_means_nothing():
    text = {"type": "text", "text": "what?", "index": 0}
    refused({"messages": [{"role": "user", "content": [text]}, ANSWER]}, "a part of a turn cannot be read")
    refused({"messages": asking(0)}, "not an image's")


@settings(max_examples=80, deadline=None)
@given(data=st.data(), images=st.integers(1, 4))
def test_images_stand_where_their_indices_say(data, images):
    indices = [*data.draw(st.permutations(range(images))), *data.draw(st.lists(st.integers(0, images - 1)))]
    indices = data.draw(st.permutations(indices))
    turns: list[dict[str, Any]] = []
    for index in indices:  # in one turn or in several, with and without text between
        if not turns or data.draw(st.booleans()):
            turns += [*([ANSWER] if turns else []), {"role": "user", "content": []}]
        turns[-1]["content"] += [{"type": "image", "index": index}]
        turns[-1]["content"] += [{"type": "text", "text": "x"}] * data.draw(st.integers(0, 1))
    record = {"images": PICTURES[:images], "messages": [*turns, ANSWER]}
    sample = read(record)
    assert [image.tobytes() for image in sample.images] == [PICTURES[i].tobytes() for i in indices]
    parts = [part for message in sample.messages for part in message["content"]]
    assert [part for part in parts if part["type"] == "image"] == [{"type": "image"}] * len(indices)
    assert preview_of_record(record).images == len(indices)


# ---- which answers are supervised

CONTEXT = [{"loss": False}, {"train": False}, {"weight": 0}, {"weight": 0.0}, {"mask": True}, {"mask": 1}]
CONTEXT += [
    {"trainable": False},
    {"masked": True},
    {"supervised": False},
    {"loss": False, "weight": 0, "mask": True, "train": None},
]
LEARNED = [{"loss": True}, {"train": 1}, {"weight": 1.0}, {"mask": False}, {"mask": None, "loss": None}]


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE])
@pytest.mark.parametrize("said", CONTEXT)
def test_an_answer_that_is_not_to_be_learned_is_context(said, template):
    turns = conversation(1, turns=3)
    turns[1] |= said
    turns[3] |= {"loss": True}
    sample, plain = (read({"image": PICTURES[0], "conversations": t}) for t in (turns, conversation(1, 3)))
    processor = tiny_processor(**{"template": template} if template else {})
    encoder = SampleEncoder(processor)
    encoded, whole = encoder(sample), encoder(plain)
    assert torch.equal(encoded.inputs["input_ids"], whole.inputs["input_ids"])
    expected = f"{turns[3]['value']}<|end|>{turns[5]['value']}<|end|>"
    assert processor.tokenizer.decode(encoded.token_ids) == expected
    assert processor.tokenizer.decode(whole.token_ids) == f"{turns[1]['value']}<|end|>{expected}"
    numbers = encoder.turns(sample)
    assert numbers.unique().tolist() == [0, 1]
    assert processor.tokenizer.decode(encoded.token_ids[numbers == 0]) == f"{turns[3]['value']}<|end|>"
    assert [answer for _, answer in sample.questions] == [turns[3]["value"], turns[5]["value"]]
    assert sample.messages[1]["supervised"] is False
    assert sample.content_hash != plain.content_hash
    jsonschema.validate({"conversations": turns}, schema("sample"))


@pytest.mark.parametrize("said", LEARNED)
def test_what_is_learned_anyway_is_the_sample_that_it_was(said):
    turns = conversation(1)
    turns[1] |= said
    turns[0] |= {"loss": False, "mask": True}  # no question is
    one, other = (read({"image": PICTURES[0], "conversations": t}) for t in (turns, conversation(1)))
    assert one.content_hash == other.content_hash
    assert all(message.keys() == {"role", "content"} for message in one.messages)
    jsonschema.validate({"conversations": turns}, schema("sample"))


@pytest.mark.parametrize(
    ("turn", "said", "message"),
    [
        (1, {"weight": 0.5}, '"weight" cannot be followed'),
        (1, {"loss": "false"}, '"loss" cannot be followed'),
        (1, {"mask": [0, 1]}, '"mask" cannot be followed'),
        (0, {"train": 2}, '"train" cannot be followed'),
        (1, {"loss": True, "weight": 0}, "contradict"),
        (1, {"loss": True, "mask": 1}, "contradict"),
        (0, {"loss": True}, "not the assistant's cannot be supervised"),
        (0, {"mask": False}, "not the assistant's cannot be supervised"),
        (1, {"loss": False}, "no assistant turn is supervised"),
        (1, {"loss_mask": [0, 1]}, '"loss_mask", which is not read'),
    ],
)
def test_what_cannot_be_heeded_about_supervision_is_refused(turn, said, message):
    turns = conversation(1, turns=1)
    turns[turn] |= said
    refused({"image": PICTURES[0], "conversations": turns}, message)


def test_an_empty_answer_is_refused_though_it_is_context():
    turns = [USER, {"role": "assistant", "content": "", "loss": False}, USER, ANSWER]
    refused({"messages": turns}, "must be text and not empty")


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(SHAPES)), learned=st.lists(st.booleans(), min_size=1, max_size=4))
def test_any_of_the_answers_may_be_context_in_any_template(name, learned):
    turns: list[dict[str, Any]] = []
    for number, on in enumerate(learned):
        answer = {"role": "assistant", "content": f"no. {number}"}
        turns += [{"role": "user", "content": f"is {number}?"}, answer if on else {**answer, "loss": False}]
    if not any(learned):
        refused({"messages": turns}, "no assistant turn is supervised")
        return
    encoder = SampleEncoder(shape_processor(name))
    sample = read({"messages": turns})
    encoded = encoder(sample)
    plain = encoder(read({"messages": [{k: t[k] for k in ("role", "content")} for t in turns]}))
    assert torch.equal(encoded.inputs["input_ids"], plain.inputs["input_ids"])
    end = SHAPES[name].end or ""
    texts = [f"no. {number}{end}" for number, on in enumerate(learned) if on]
    assert re.sub(r"\s", "", encoder.processor.tokenizer.decode(encoded.token_ids)) == re.sub(
        r"\s", "", "".join(texts)
    )
    assert encoder.turns(sample).unique().tolist() == list(range(len(texts)))
    assert [answer for _, answer in sample.questions] == [text.removesuffix(end) for text in texts]


def test_a_context_answer_is_not_asked():
    turns = conversation(1, turns=3)
    turns[1]["weight"] = 0
    asked = questions_of(read({"image": PICTURES[0], "conversations": turns}))
    assert [one.questions[0][1] for one in asked] == [turns[3]["value"], turns[5]["value"]]


@pytest.fixture(scope="module")
def partly(tmp_path_factory, teacher_path) -> tuple[Path, Path]:
    """Data of three answers whose first, and in one sample the first two, are context; and their cache."""
    folder = tmp_path_factory.mktemp("partly")
    records = []
    for index in range(4):
        turns = conversation(index, turns=3)
        turns[1]["loss"] = False
        if index == 3:
            turns[3]["mask"] = True
        noise_image(index).save(folder / f"{index}.png")
        records.append({"id": f"s{index}", "image": f"{index}.png", "conversations": turns})
    (folder / "d.json").write_text(json.dumps(records))
    return folder / "d.json", dump_cache(folder / "cache", teacher_path, folder / "d.json")


def test_a_cache_holds_the_answers_that_are_learned(partly):
    data, cache = partly
    decode = tiny_processor().tokenizer.decode
    samples = open_samples(data)
    for index, key in enumerate(samples.keys):
        answers = [answer for _, answer in samples[index].questions]
        assert len(answers) == (1 if index == 3 else 2)
        assert decode(LogitCache(cache)[key].token_ids) == "".join(f"{answer}<|end|>" for answer in answers)


def test_peek_puts_the_tokens_under_the_answers_that_are_learned(partly):
    data, cache = partly
    arguments = ["peek", str(cache), "--data", str(data)]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    for sample in found:
        learned = [message["text"] for message in sample["messages"] if message["supervised"]]
        for turn, answer in enumerate(learned):
            tokens = [token["text"] for token in sample["tokens"] if token["turn"] == turn]
            assert "".join(tokens) == f"{answer}<|end|>"
        assert {token["turn"] for token in sample["tokens"]} == set(range(len(learned)))
    printed = CliRunner().invoke(app, [*arguments, "s0"], catch_exceptions=False).stdout
    assert printed.count("assistant:") == 3
    # A table under each answer that is learned, none under the context.
    first = printed.index("assistant:")
    assert "rank" not in printed[first : printed.index("user:", first)]
    assert "rank" in printed[printed.index("assistant:", first + 1) :]


# ---- system texts


def test_a_records_system_text_is_the_first_turn():
    system = {"role": "system", "content": "Be brief."}
    expected = read({"messages": [system, USER, ANSWER]})
    for fields in ({"system": "Be brief."}, {"system_prompt": "Be brief.", "system": None}):
        assert read({**fields, "messages": [USER, ANSWER]}).messages == expected.messages
        assert read({**fields, "messages": [system, USER, ANSWER]}).messages == expected.messages
        outlined = preview_of_record({**fields, "messages": [system, USER, ANSWER]})
        assert outlined.texts == ["Be brief.", "what?", "red"]
        assert preview_of_record({**fields, "messages": [USER, ANSWER]}) == outlined
    assert read({"system": "", "messages": [USER, ANSWER]}).messages == expected.messages[1:]
    text, supervised = encoded_text(
        tiny_processor(), read({"system": "be brief", "messages": [USER, ANSWER]})
    )
    assert text.startswith("<|system|>\nbe brief<|end|>")
    assert supervised == "red<|end|>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"system": "a", "system_prompt": "b"}, "two system texts"),
        ({"system": ["a"]}, '"system" is not text'),
        ({"system_prompt": 3}, '"system_prompt" is not text'),
        ({"system": "other"}, "not that of the conversation"),
    ],
)
def test_a_system_text_that_cannot_be_heeded_is_refused(fields, message):
    refused({**fields, "messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}, message)


# ---- tools and tool turns

# After Qwen2.5's: tools stand in the system turn, tool turns in a user's, neighbours together.
QWEN_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}"
    "{%- else %}{{- '" + QWEN_SYSTEM + "' }}{%- endif %}"
    "{{- '\n\n# Tools\n\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}"
    "{{- '\n</tools>\n\nAnswer with a <tool_call>.<|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": "zoom", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "read_text", "description": "Größe <b>"}},
]
CALL = '<tool_call>\n{"name": "zoom", "arguments": {}}\n</tool_call>'
TOOL_TURNS = [
    {"from": "human", "value": "what is small?"},
    {"from": "gpt", "value": CALL},
    {"from": "observation", "value": '{"seen": 1}'},
    {"role": "tool", "content": "done"},
    {"from": "gpt", "value": "a dog"},
]


def test_tools_and_tool_turns_are_rendered_as_the_template_has_them():
    sample = read({"tools": TOOLS, "system": "Be brief.", "conversations": TOOL_TURNS})
    text, supervised = encoded_text(shape_processor("qwen3", QWEN_TOOLS), sample)
    listed = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in TOOLS)
    assert text == (
        f"<|im_start|>system\nBe brief.\n\n# Tools\n\n<tools>{listed}\n</tools>\n\n"
        "Answer with a <tool_call>.<|im_end|>\n<|im_start|>user\nwhat is small?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\n"
        '{"seen": 1}\n</tool_response>\n<tool_response>\ndone\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\na dog<|im_end|>\n"
    )
    assert supervised == f"{CALL}<|im_end|>a dog<|im_end|>"


def test_it_is_what_transformers_makes_of_them():
    processor = shape_processor("qwen3", QWEN_TOOLS)
    sample = read({"tools": TOOLS, "conversations": TOOL_TURNS})
    turns = [
        {"role": message["role"], "content": message["content"][0]["text"]} for message in sample.messages
    ]
    theirs = processor.tokenizer.apply_chat_template(turns, tools=TOOLS, tokenize=True, return_dict=True)
    assert SampleEncoder(processor)(sample).inputs["input_ids"].tolist() == theirs["input_ids"]


def test_tools_are_a_list_or_its_json():
    sample = read({"tools": TOOLS, "conversations": TOOL_TURNS})
    assert sample.tools == tuple(TOOLS)
    assert read({"tools": json.dumps(TOOLS), "conversations": TOOL_TURNS}).content_hash == sample.content_hash
    # A table gives every tool the fields of all.
    filled = [{**tool, "strict": None} for tool in TOOLS]
    assert read({"tools": filled, "conversations": TOOL_TURNS}).content_hash == sample.content_hash
    plain = read({"conversations": TOOL_TURNS})
    for nothing in (None, [], "", "[]", "null"):
        assert read({"tools": nothing, "conversations": TOOL_TURNS}).content_hash == plain.content_hash
    assert len({sample.content_hash, plain.content_hash}) == 2
    swapped = read({"tools": TOOLS[::-1], "conversations": TOOL_TURNS})
    assert swapped.content_hash != sample.content_hash
    outlined = preview_of_record({"tools": json.dumps(TOOLS), "conversations": TOOL_TURNS})
    assert outlined.texts == [json.dumps(TOOLS), *(turn.get("value", "done") for turn in TOOL_TURNS)]


@pytest.mark.parametrize(
    "tools", [{"name": "zoom"}, "zoom", "{", ["zoom"], 3, [{"name": b"zoom"}], [json.dumps(TOOLS[0])]]
)
def test_tools_that_cannot_be_read_are_refused(tools):
    refused({"tools": tools, "conversations": TOOL_TURNS}, '"tools" cannot be read')


def encoding_refused(processor: Any, record: dict[str, Any], message: str) -> str:
    with pytest.raises(BadSample, match=message) as caught:
        SampleEncoder(processor)(read(record))
    return str(caught.value)


def test_a_template_that_takes_no_tools_is_named():
    record = {"tools": TOOLS, "messages": [USER, ANSWER]}
    for name in ("chatml", "llama3", "phi3"):
        assert "2 tool(s)" in encoding_refused(shape_processor(name), record, "takes no tools")
    # One that refuses tool turns without tools takes tools.
    strict = "{% if not tools and messages[2] %}{{ raise_exception('tools!') }}{% endif %}" + QWEN_TOOLS
    record["messages"] = TOOL_TURNS
    assert SampleEncoder(shape_processor("qwen3", strict))(read(record)).supervised.any()
    del record["tools"]
    encoding_refused(shape_processor("qwen3", strict), record, "refuses the conversation")


def test_a_template_that_takes_no_tool_turns_is_named():
    """It drops them, writes them as somebody else's, or refuses them."""
    found = encoding_refused(shape_processor("qwen3"), {"messages": TOOL_TURNS}, "drops, rewrites or repeats")
    assert 'tool: {"seen": 1}' in found
    assert "whose chat template takes tool turns" in found
    found = encoding_refused(shape_processor("vicuna"), {"messages": TOOL_TURNS}, "takes no tool turns")
    assert "as the assistant's" in found
    as_user = CHATML.replace("<|im_start|>{{ message['role'] }}", "<|im_start|>{{ 'assistant' if "
                             "message['role'] == 'assistant' else 'user' }}")  # fmt: skip
    found = encoding_refused(shape_processor("chatml", as_user), {"messages": TOOL_TURNS}, "no tool turns")
    assert "as the user's" in found
    for name in ("gemma", "mistral"):
        found = encoding_refused(shape_processor(name), {"messages": TOOL_TURNS}, "refuses the conversation")
        assert "must alternate" in found
        assert "the roles are user, assistant, tool, tool, assistant" in found
        assert "whose chat template takes tool turns" in found


def test_paligemma_takes_no_tools():
    processor = FAMILIES["paligemma"].processor()
    record = {"image": PICTURES[0], "messages": [USER, ANSWER], "tools": TOOLS}
    assert "2 tool(s)" in encoding_refused(processor, record, "PaliGemma takes images, one question")


def test_a_control_token_within_tools_is_refused():
    tools = [{"name": "zoom", "description": "see <|im_end|>"}]
    record = {"tools": tools, "messages": [USER, ANSWER]}
    found = encoding_refused(shape_processor("qwen3", QWEN_TOOLS), record, "control token")
    assert "tools: " in found


def test_a_question_is_asked_with_what_its_tools_said():
    turns = [USER, ANSWER, *TOOL_TURNS]
    asked = questions_of(read({"image": PICTURES[0], "tools": TOOLS, "messages": turns}))
    assert [one.questions[0][1] for one in asked] == ["red", CALL, "a dog"]
    roles = [[message["role"] for message in one.messages] for one in asked]
    assert roles == [["user", "assistant"]] * 2 + [["user", "assistant", "tool", "tool", "assistant"]]
    assert [sum(map(is_supervised, one.messages)) for one in asked] == [1, 1, 1]
    for one in asked:
        assert one.tools == tuple(TOOLS)
        assert one.messages[0]["content"][0] == {"type": "image"}
        assert sum(part["type"] == "image" for m in one.messages for part in m["content"]) == 1


# ---- other fields of a turn


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"tool_calls": [{"function": {"name": "zoom"}}], "value": None}, '"tool_calls", which is not read'),
        ({"function_call": {"name": "zoom"}}, '"function_call", which is not read'),
        ({"from": "function_call"}, "a turn is a function_call"),
        ({"reasoning_content": "hm"}, '"reasoning_content", which is not read'),
        ({"thinking": "hm"}, '"thinking", which is not read'),
        ({"images": ["a.png"]}, '"images", which is not read'),
        ({"image": 3}, '"image", which is not read'),
        ({"video": "a.mp4"}, '"video", which is not read'),
        ({"name": 5}, '"name" is not text'),
    ],
)
def test_a_field_that_changes_a_turn_is_refused(said, message):
    turns = conversation(1, turns=1)
    turns[1] |= said
    text = refused({"image": PICTURES[0], "conversations": turns}, message)
    assert "name" in said or "try:" in text
    assert not valid("sample", {"conversations": turns})


def test_fields_that_say_nothing_or_that_nobody_reads_are_left_alone():
    turns = conversation(1, turns=1)
    turns[1] |= {"tool_calls": None, "images": [], "thinking": "", "timestamp": 3, "source": "mine"}
    turns[1] |= {"name": None, "loss": None}
    record = {"conversations": turns, "video": None, "audios": [], "source": "https://x.org/a.png.html"}
    plain = read({"image": PICTURES[0], "conversations": conversation(1, turns=1)})
    assert read({"image": PICTURES[0], **record}).content_hash == plain.content_hash
    jsonschema.validate(record, schema("sample"))


def test_a_name_is_the_templates():
    named = CHATML.replace("['role'] }}\n", "['role'] + (' ' + message.name if message.name else '') }}\n")
    turns = [{**USER, "name": "Ada"}, {**ANSWER, "loss": False}, USER, ANSWER]
    text, supervised = encoded_text(shape_processor("chatml", named), read({"messages": turns}))
    assert "<|im_start|>user Ada\nwhat?<|im_end|>" in text
    assert supervised == "red<|im_end|>"


def test_what_is_supervised_is_not_the_templates_to_know():
    everything = CHATML.replace("['role'] }}\n", "['role'] }}{{ message | length }}\n")
    turns = [USER, {**ANSWER, "loss": False}, USER, ANSWER]
    text, _ = encoded_text(shape_processor("chatml", everything), read({"messages": turns}))
    assert text.count("<|im_start|>assistant2\n") == 2


def test_columns_of_turns_must_be_of_one_length():
    refused({"conversations": {"from": ["human", "gpt"], "value": ["what?"]}}, "of different lengths")


# ---- video and audio


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"video": "a.mp4"}, 'the record has "video"'),
        ({"videos": ["a.mp4"]}, 'the record has "videos"'),
        ({"audio": {"bytes": b"RIFF", "path": None}}, 'the record has "audio"'),
        ({"messages": [{"role": "user", "content": "<video>\nwhat?"}, ANSWER]}, "a turn has <video>"),
        ({"messages": [{"role": "user", "content": "<VIDEO>\nwhat?"}, ANSWER]}, "a turn has <VIDEO>"),
        (
            {"messages": [{"role": "user", "content": "<|video_pad|>?"}, ANSWER]},
            r"a turn has <\|video_pad\|>",
        ),
        ({"messages": [{"role": "user", "content": "<video_0> what?"}, ANSWER]}, "a turn has <video_0>"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "<audio>"}]}, ANSWER]},
            "<audio>",
        ),
        ({"system": "see <video>"}, "a turn has <video>"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, ANSWER]}, "has video"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, ANSWER]},
            "has audio",
        ),
    ],
)
def test_video_and_audio_are_refused_by_name(fields, message):
    refused({"messages": [USER, ANSWER], **fields}, message)


def test_an_answer_may_speak_of_video():
    turns = [USER, {"role": "assistant", "content": "the <video> tag"}]
    assert (
        read({"messages": turns, "audio": {"bytes": None, "path": None}}).questions[0][1] == "the <video> tag"
    )


# ---- there and back


def test_an_export_is_the_same_data(tmp_path):
    """With tools, tool turns, a name and context: what `cachekd export` writes is read as it was."""
    template = PLAIN_TEMPLATE.replace(
        "{%- for m in messages -%}", "{%- if tools -%}{{ tools }}{%- endif -%}{%- for m in messages -%}", 1
    )
    teacher = save_vlm(tmp_path / "teacher", tiny_processor(template=template), seed=1)
    noise_image(0).save(tmp_path / "0.png")
    noise_image(1).save(tmp_path / "1.png")
    first = {"id": "a", "tools": [{"name": "z"}], "system": "be brief", "conversations": [*TOOL_TURNS]}
    first["conversations"][1] = {**TOOL_TURNS[1], "loss": False, "name": "me"}
    second = {"id": "b", "images": ["0.png", "1.png"], "messages": asking(1, "or", 0, 1)}
    (tmp_path / "d.json").write_text(json.dumps([first, second]))
    samples = open_samples(tmp_path / "d.json")
    cache = dump_cache(tmp_path / "cache", teacher, tmp_path / "d.json")
    export_webdataset(cache, tmp_path / "out", samples)
    again = open_samples(tmp_path / "out")
    hashes = [{s.keys[i]: s[i].content_hash for i in range(len(s))} for s in (samples, again)]
    assert hashes[0] == hashes[1]
    for sample in (samples[0], samples[1]):
        record = {"messages": sample.messages, "tools": sample.tools}
        jsonschema.validate(json.loads(json.dumps(record)), schema("sample"))


def test_the_schema_says_every_field_that_decides_what_is_supervised():
    assert SUPERVISION_FIELDS.keys() < Message.model_fields.keys()
    assert SUPERVISION_FIELDS.keys() < LlavaTurn.model_fields.keys()
