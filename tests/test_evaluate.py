"""Exact match is what greedy decoding would give; agreement is measured against the live teacher."""

from __future__ import annotations

import pytest
import torch
from tiny import noise_image, save_vlm, tiny_processor

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.evaluate import ask_alone, evaluate, question_type
from cachekd.samples import SampleEncoder, open_samples, sample_from_llava
from cachekd.train import train
from cachekd.vlm import load_model, load_processor

CPU = torch.device("cpu")


def with_images(sample):
    """The messages with the images themselves in their image parts, as processors take them."""
    images = iter(sample.images)
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": next(images)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in sample.messages
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student_path, data_path):
    """A student that has learned some of the answers, so that exact match is neither 0 nor 1."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    settings = {"lambda_align": 0, "lambda_vsd": 0, "epochs": 12, "batch_size": 4, "learning_rate": 1e-3}
    train(TrainConfig(student=str(student_path), data=data_path, out=out, **settings))
    return out


def test_exact_match_equals_greedy_generation(trained, data_path):
    result = evaluate([str(trained)], data_path)
    processor, model = load_processor(str(trained)), load_model(str(trained), dtype=torch.float32, device=CPU)
    samples, hits, total = open_samples(data_path), 0, 0
    for index in range(len(samples)):
        for question in ask_alone(samples[index]):
            prompt = processor.apply_chat_template(
                with_images(question)[:-1],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )
            made = model.generate(**prompt, max_new_tokens=40, do_sample=False)
            text = processor.tokenizer.decode(made[0, prompt["input_ids"].shape[1] :])
            hits += text == question.questions[0][1] + "<|end|>"
            total += 1
    assert result.questions == total == sum(result.types.values())
    assert result.models[0].exact_match == pytest.approx(hits / total)
    assert 0 < hits < total


def test_a_teacher_agrees_with_itself_and_not_with_another(teacher_path, student_path, data_path):
    result = evaluate(
        [str(teacher_path), str(student_path)], data_path, teacher=str(teacher_path), batch_size=5
    )
    same, other = result.models
    assert result.teacher is not None
    assert same.top1_agreement == 1.0
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    assert same.exact_match == result.teacher.exact_match
    assert other.top1_agreement < 1.0
    assert other.kl > 0.0


def test_batch_size_changes_nothing(trained, teacher_path, data_path):
    one, many = (
        evaluate([str(trained)], data_path, teacher=str(teacher_path), batch_size=size).models[0]
        for size in (1, 7)
    )
    assert one.exact_match == many.exact_match
    assert one.by_type == many.by_type
    assert one.kl == pytest.approx(many.kl, rel=1e-4)


def test_progress_counts_every_sample_and_question(student_path, data_path):
    seen = []
    result = evaluate([str(student_path)], data_path, batch_size=4, progress=lambda *done: seen.append(done))
    assert sum(samples for samples, _ in seen) == 12
    assert sum(questions for _, questions in seen) == result.questions


def test_each_question_is_asked_alone():
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "what is <image> this?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "is it red?"},
        {"from": "gpt", "value": "yes"},
    ]
    sample = sample_from_llava("k", turns, (noise_image(0),), origin="test")
    first, second = ask_alone(sample)
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant"]
    assert [part["type"] for part in first.messages[1]["content"]] == ["text", "image", "text"]
    assert [part["type"] for part in second.messages[1]["content"]] == ["image", "text"]
    assert [question_type(one) for one in (first, second)] == ["what is", "is it"]
    for one in (first, second):
        assert len(SampleEncoder(tiny_processor())(one).token_ids) > 1


def test_models_of_different_tokenizers_are_refused(tmp_path, student_path, data_path):
    other = save_vlm(tmp_path / "other", tiny_processor(corpus=["zebra quagga okapi"] * 9))
    with pytest.raises(CachekdError, match="different tokenizers"):
        evaluate([str(student_path), str(other)], data_path)
