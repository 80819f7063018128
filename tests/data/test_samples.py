"""Reading data sets, and finding exactly the assistant's tokens in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cachekd.data import SampleEncoder, collate, open_samples, predicting_positions, sample_from_llava
from cachekd.errors import CachekdError
from tiny import (
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    conversation,
    noise_image,
    png_bytes,
    tar_members,
    tiny_processor,
    write_llava_json,
    write_tar,
)

TEMPLATES = {"marked": MARKED_TEMPLATE, "plain": PLAIN_TEMPLATE}


def supervised_texts(processor, encoded) -> list[str]:
    """Decode each run of supervised tokens."""
    texts, run = [], []
    for token, on in zip(encoded.inputs["input_ids"].tolist(), encoded.supervised.tolist(), strict=True):
        if on:
            run.append(token)
        elif run:
            texts.append(processor.tokenizer.decode(run))
            run = []
    return texts + ([processor.tokenizer.decode(run)] if run else [])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("class_token", [True, False])
def test_supervised_tokens_decode_to_the_answers(template, class_token):
    processor = tiny_processor(template=TEMPLATES[template], class_token=class_token)
    turns = conversation(1, turns=3)
    sample = sample_from_llava("k", turns, (noise_image(0),), origin="test")
    encoded = SampleEncoder(processor)(sample)
    answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
    assert supervised_texts(processor, encoded) == [f"{answer}<|end|>" for answer in answers]
    assert encoded.token_ids.tolist() == encoded.inputs["input_ids"][encoded.supervised].tolist()


words = st.text(st.characters(codec="utf-8", exclude_characters="<>{}\x00"), min_size=1).filter(
    lambda text: text.strip() == text and text != ""
)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4), images=st.integers(1, 2))
def test_marked_and_plain_templates_supervise_the_same_tokens(pairs, images):
    turns = []
    for question, answer in pairs:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    sample = sample_from_llava("k", turns, tuple(noise_image(i) for i in range(images)), origin="test")
    marked, plain = (
        SampleEncoder(tiny_processor(template=t))(sample) for t in (MARKED_TEMPLATE, PLAIN_TEMPLATE)
    )
    assert torch.equal(marked.inputs["input_ids"], plain.inputs["input_ids"])
    assert torch.equal(marked.supervised, plain.supervised)
    processor = tiny_processor()
    assert supervised_texts(processor, marked) == [f"{answer}<|end|>" for _, answer in pairs]


def test_images_anywhere_in_the_conversation_keep_their_places():
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "<image>\nand <image> are?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "now <image>"},
        {"from": "gpt", "value": "yes"},
    ]
    images = tuple(noise_image(i) for i in range(3))
    sample = sample_from_llava("k", turns, images, origin="test")
    kinds = [[part["type"] for part in message["content"]] for message in sample.messages]
    assert kinds == [["text"], ["image", "text", "image", "text"], ["text"], ["text", "image"], ["text"]]
    for template in TEMPLATES.values():
        processor = tiny_processor(template=template)
        encoded = SampleEncoder(processor)(sample)
        assert supervised_texts(processor, encoded) == ["red<|end|>", "yes<|end|>"]
        assert encoded.inputs["pixel_values"].shape == (3, 3, 32, 32)
        assert int((encoded.inputs["input_ids"] == 1).sum()) == 3 * 16


def test_collate_pads_on_the_right_and_keeps_masks():
    processor = tiny_processor()
    encoder = SampleEncoder(processor)
    encoded = [
        encoder(sample_from_llava(str(i), conversation(i, 1 + i), (noise_image(i),), origin="test"))
        for i in range(3)
    ]
    batch = collate(encoded, processor.tokenizer.pad_token_id)
    for row, one in enumerate(encoded):
        length = len(one)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        assert torch.equal(batch["input_ids"][row, :length], one.inputs["input_ids"])
        assert torch.equal(batch["supervised"][row, :length], one.supervised)
        assert not batch["supervised"][row, length:].any()
    positions = predicting_positions(batch["supervised"])
    assert torch.equal(positions[:, :-1], batch["supervised"][:, 1:])
    assert int(positions.sum()) == int(batch["supervised"].sum())


def test_both_formats_read_the_same_samples(tmp_path: Path):
    members = [
        (
            name,
            json.dumps({"conversations": conversation(int(name[1:4]))}).encode()
            if name.endswith("json")
            else data,
        )
        for name, data in tar_members(5)
    ]
    write_tar(tmp_path / "tars" / "0.tar", members[:4])
    write_tar(tmp_path / "tars" / "1.tar", members[4:])
    tars = open_samples(tmp_path / "tars")
    records = open_samples(write_llava_json(tmp_path / "json", 5))
    assert tars.keys == records.keys == [f"s{i:03d}" for i in range(5)]
    for index in range(5):
        assert tars[index].content_hash == records[index].content_hash
        assert tars[index].messages == records[index].messages


def test_jsonl_and_single_tar(tmp_path: Path):
    path = write_llava_json(tmp_path, 3)
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(json.dumps(record) for record in json.loads(path.read_text())))
    assert open_samples(lines).keys == open_samples(path).keys
    assert len(open_samples(write_tar(tmp_path / "one.tar", tar_members(2)))) == 2


def test_content_hash_changes_with_text_and_pixels():
    base = sample_from_llava("k", conversation(0), (noise_image(0),), origin="a")
    assert (
        base.content_hash
        == sample_from_llava("other", conversation(0), (noise_image(0),), origin="b").content_hash
    )
    assert (
        base.content_hash
        != sample_from_llava("k", conversation(1), (noise_image(0),), origin="a").content_hash
    )
    assert (
        base.content_hash
        != sample_from_llava("k", conversation(0), (noise_image(1),), origin="a").content_hash
    )


def test_exif_rotation_is_applied_and_grey_becomes_rgb(tmp_path: Path):
    image = Image.new("L", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    image.save(tmp_path / "0.png", exif=exif)
    record = {"id": "a", "image": "0.png", "conversations": conversation(0)}
    (tmp_path / "d.json").write_text(json.dumps([record]))
    (read,) = open_samples(tmp_path / "d.json")[0].images
    assert (read.mode, read.size) == ("RGB", (20, 40))


# ---- bad input: each is named, with its place


def llava(tmp_path: Path, **changes) -> Path:
    noise_image(0).save(tmp_path / "0.png")
    record = {"id": "bad-one", "image": "0.png", "conversations": conversation(0)} | changes
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{k: v for k, v in record.items() if v is not None}]))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "gone.png"}, "the image 'gone.png' is missing"),
        ({"image": "d.json"}, "the image 'd.json' cannot be read"),
        ({"image": None}, "placeholders differs from the number of images"),
        ({"image": None, "img": "0.png"}, "an image under another name"),
        ({"conversations": [{"from": "human", "value": "<image>\nhello?"}]}, "no assistant turn"),
        ({"conversations": []}, "no conversation"),
        ({"conversations": None}, "no conversation"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "a turn cannot be read"),
        (
            {"conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}]},
            "placehold",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}]},
            "not empty",
        ),
    ],
)
def test_a_bad_sample_is_named(tmp_path: Path, changes, message):
    samples = open_samples(llava(tmp_path, **changes))
    with pytest.raises(CachekdError, match=message) as caught:
        samples[0]
    assert "bad-one" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "empty"),
        ("{", "not valid JSON"),
        ('{\n"data": [{"id": 1}]}', "holds one object"),
        ('{"meta": 1, "data": [{"id": 1}]}', "holds one object"),
        ('[{"id": 1}, 2]', "unexpected form"),
        ('{"id": 1}\n2', "unexpected form"),
        ('[{"id": [1]}]', "neither text nor a number"),
    ],
)
def test_a_bad_json_file_is_named(tmp_path: Path, text, message):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(CachekdError, match=message) as caught:
        open_samples(path)
    assert str(path) in str(caught.value)


def test_a_bad_tar_is_named(tmp_path: Path):
    good = tar_members(2)
    whole = write_tar(tmp_path / "b.tar", good)
    whole.write_bytes(whole.read_bytes()[: good[0][1].__len__() + 700])
    with pytest.raises(CachekdError, match="cannot be read to its end"):
        open_samples(whole)
    with pytest.raises(CachekdError, match=r"no json.*") as caught:
        open_samples(write_tar(tmp_path / "c.tar", [("x.png", png_bytes(noise_image(0)))]))[0]
    assert "x.png" in str(caught.value)
    with pytest.raises(CachekdError, match="no image") as caught:
        open_samples(write_tar(tmp_path / "d.tar", [("my.photo.png", b""), ("my.json", b"{}")]))[0]
    assert "dots in names" in str(caught.value)
    with pytest.raises(CachekdError, match="no extension"):
        open_samples(write_tar(tmp_path / "e.tar", [("000017", b"")]))
    with pytest.raises(CachekdError, match="JSON is not valid"):
        open_samples(write_tar(tmp_path / "f.tar", [("x.png", good[0][1]), ("x.json", b"{")]))[0]
    with pytest.raises(CachekdError, match="cannot be read"):
        open_samples(
            write_tar(tmp_path / "g.tar", [("x.png", b"no png"), good[1]][:1] + [("x.json", good[1][1])])
        )[0]


def test_missing_and_unknown_paths(tmp_path: Path):
    with pytest.raises(CachekdError, match="does not exist"):
        open_samples(tmp_path / "nothing.json")
    with pytest.raises(CachekdError, match="no data found"):
        open_samples(tmp_path)


def test_a_processor_without_template_is_refused():
    processor = tiny_processor()
    processor.chat_template = None
    with pytest.raises(CachekdError, match="no chat template"):
        SampleEncoder(processor)


def test_marks_around_something_else_are_refused():
    question = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    question = question.replace("{%- else -%}", "{%- else -%}{% generation %}question{% endgeneration %}")
    sample = sample_from_llava("k", conversation(0, 1), (noise_image(0),), origin="test")
    with pytest.raises(CachekdError, match="does not match the answers"):
        SampleEncoder(tiny_processor(template=question))(sample)


def test_a_token_across_the_border_of_an_answer_is_refused():
    template = PLAIN_TEMPLATE.replace("<|assistant|>{{ '\\n' }}", "<|assistant|>a")
    processor = tiny_processor(template=template, corpus=["ayes ayes ayes"] * 9)
    turns = [{"from": "human", "value": "ok?"}, {"from": "gpt", "value": "yes"}]
    sample = sample_from_llava("k", turns, (noise_image(0),), origin="test")
    with pytest.raises(CachekdError, match="crosses the border"):
        SampleEncoder(processor)(sample)


def test_the_mask_is_what_transformers_own_return_assistant_tokens_mask_gives():
    processor = tiny_processor(template=MARKED_TEMPLATE)
    sample = sample_from_llava("k", conversation(2, turns=2), (noise_image(0),), origin="test")
    encoded = SampleEncoder(processor)(sample)
    messages = [dict(message) for message in sample.messages]
    for message in messages:
        content = [dict(part) for part in message["content"]]
        message["content"] = [
            {**part, "image": sample.images[0]} if part["type"] == "image" else part for part in content
        ]
    theirs = processor.apply_chat_template(
        [messages],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    assert theirs["input_ids"][0].tolist() == encoded.inputs["input_ids"].tolist()
    mask = torch.as_tensor(theirs["assistant_masks"][0]).bool()
    assert mask.any()
    # Theirs also has the line break after the end-of-turn token, where the marks include it.
    ours = encoded.supervised
    assert (mask | ~ours).all()
    extra = encoded.inputs["input_ids"][mask & ~ours].tolist()
    assert all(processor.tokenizer.decode([token]).isspace() for token in extra)
