"""The demo's starting student, and the script that makes it."""

from __future__ import annotations

import json
import random
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from cachekd.data import sample_from_llava
from cachekd.models import ModelFiles, load_model, load_processor
from cachekd.models.fingerprint import reads_otherwise
from caches import ROOT

EXAMPLE = ROOT / "examples" / "easy_vqa"
SIZES = ("--pictures=64", "--tower-steps=2", "--language-steps=5", "--projector-steps=2")


@pytest.fixture
def train_base(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import train_base

    random.seed(0)
    return train_base


def made(folder: Path, *options: str) -> dict[str, bytes]:
    """The files of a student that a short training makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_base.py", "--out", str(folder), *SIZES, *options])
        sys.modules["train_base"].main()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_command_makes_the_same_student(tmp_path, train_base):
    files = made(tmp_path / "a")
    assert files == made(tmp_path / "b")
    assert files["config.json"] == (EXAMPLE / "student" / "config.json").read_bytes()
    assert sum(path.stat().st_size for path in (EXAMPLE / "student").iterdir()) <= 2e6


def test_the_student_with_another_tokenizer_has_the_same_eyes(tmp_path, train_base):
    """And it learns its chats as its chat template writes them."""
    files = made(tmp_path / "pieces", "--tokenizer", "pieces")
    assert files == made(tmp_path / "again", "--tokenizer", "pieces")
    folders = (tmp_path / "pieces", EXAMPLE / "student")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "vision_tower" in name)
    one, other = map(ModelFiles, folders)
    assert reads_otherwise(one.fingerprints, other.fingerprints)

    from data import conversation

    markup, tokenizer = train_base.PIECES, one.processor.tokenizer
    pairs = [("is there a red shape?", "no"), ("what shape is present?", "rectangle")]
    sample = sample_from_llava("k", conversation(pairs, picture=False), (), origin="test")
    text = [markup.first, pairs[0][0], markup.assistant, markup.blank, pairs[0][1], markup.end]
    text += [markup.user, pairs[1][0], markup.assistant, markup.blank, pairs[1][1], markup.end]
    written = tokenizer("".join(text))["input_ids"]
    encoded = one.encoder(sample)
    assert encoded.inputs["input_ids"].tolist()[: len(written)] == written
    answers = tokenizer.convert_ids_to_tokens(encoded.token_ids.tolist())
    assert answers == ["Ġno", markup.end, "Ġre", "cta", "ngle", markup.end]


def test_a_token_begins_as_the_mean_of_its_pieces(train_base):
    processor = train_base.make_pieces_processor()
    model = train_base.with_tokenizer_of(processor, train_base.PIECES)
    old = load_processor(str(EXAMPLE / "student")).tokenizer
    weights = load_file(EXAMPLE / "student" / "model.safetensors")
    [before] = [weight for name, weight in weights.items() if "embed_tokens" in name]
    number = processor.tokenizer.convert_tokens_to_ids
    rows = {
        "Ġyes": before[old.convert_tokens_to_ids(["Ġ", "yes"])].float().mean(0),
        "Ġred": before[old.convert_tokens_to_ids("Ġred")].float(),
        "<end_of_utterance>": before[old.convert_tokens_to_ids("<|end|>")].float(),
    }
    for token, row in rows.items():
        assert torch.equal(model.get_input_embeddings().weight[number(token)], row)


def test_questions_have_the_answers_that_the_description_gives(train_base):
    kinds = set()
    for _ in range(400):
        negated, bare = random.random() < 0.5, random.random() < 0.3
        shape, color = random.choice(train_base.SHAPES), random.choice(train_base.COLORS)
        question, answer = train_base.question_about(shape, color, negated=negated and not bare, bare=bare)
        words = question.removesuffix("?").split()
        kinds.add((words[0], answer))
        if answer in ("yes", "no"):
            there = shape in words or color in words
            assert answer == ("yes" if there != bool({"no", "not"} & set(words)) else "no"), question
        else:
            assert answer == {"shape": shape, "color": color}[words[-1]]
    assert {("no", "yes"), ("no", "no"), ("a", "yes"), ("does", "no")} <= kinds


def test_none_of_the_questions_is_one_of_the_data_set(train_base):
    from data import questions_by_image

    asked = {
        q for split in ("train", "test") for pairs in questions_by_image(split).values() for q, _ in pairs
    }
    for _ in range(400):
        shape, color = random.choice(train_base.SHAPES), random.choice(train_base.COLORS)
        assert train_base.question_about(shape, color, negated=True, bare=False)[0] not in asked


def test_the_committed_student_writes_captions(train_base):
    """Of pictures that it has not seen."""
    model = load_model(str(EXAMPLE / "student"), dtype=torch.float32, device=torch.device("cpu"))
    processor = load_processor(str(EXAMPLE / "student"))
    random.seed(12345)
    pixels, shapes, colors = train_base.draw(60)
    prompt = "<|user|>" + "<image>" * model.config.image_seq_length + "<|end|><|assistant|>"
    ids = processor.tokenizer([prompt] * len(pixels), return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=16, do_sample=False)
    texts = processor.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    names = zip(shapes.tolist(), colors.tolist(), strict=True)
    right = [
        train_base.SHAPES[s] in text and train_base.COLORS[c] in text
        for text, (s, c) in zip(texts, names, strict=True)
    ]
    assert sum(right) >= 50, texts


def test_most_conversations_begin_with_a_question_of_yes_or_no(tmp_path, train_base):
    """In the data set's order next to none does, and after an answer that names the shape nobody looks."""
    from data import write_tar

    assert write_tar("train", tmp_path / "0.tar", images=100, turns=3) == 300
    with tarfile.open(tmp_path / "0.tar") as tar:
        records = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    first = [record["conversations"][1]["value"] for record in records]
    assert sum(answer in ("yes", "no") for answer in first) > 60
