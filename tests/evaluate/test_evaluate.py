"""Exact match is what greedy decoding would give; agreement is with the teacher."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cachekd.config import DumpConfig, EvalConfig, TrainConfig, read_config
from cachekd.data import SampleEncoder, collate, open_samples, predicting_positions, sample_from_llava
from cachekd.data.preview import preview_of_record
from cachekd.dump import dump
from cachekd.errors import BadSample, CachekdError
from cachekd.evaluate import read_scores
from cachekd.evaluate.inputs import AnswerPrior
from cachekd.evaluate.questions import (
    QuestionEncoder,
    blinded,
    one_line,
    question_text,
    question_type,
    questions_of,
)
from cachekd.evaluate.scores import MAX_TYPES
from cachekd.models import load_model, load_processor, model_files
from cachekd.paths import EVALUATIONS_FOLDER, RUN_FILE, shortest
from cachekd.train import train
from cachekd_cli.main import app
from tiny import (
    ANSWERS,
    MARKED_TEMPLATE,
    QUESTIONS,
    evaluated,
    noise_image,
    save_vlm,
    tiny_processor,
    write_llava_json,
)
from tiny_families import FAMILIES

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


def halves(seed):
    """Bright on the left or on the right: their mean colour says nothing."""
    pixels = noise_image(seed).resize((16, 32)).point(lambda value: value // 4)
    image = Image.new("RGB", (32, 32), "white")
    image.paste(pixels, (16 * (seed % 2), 0))
    return image


def write_pictures(folder, seeds, *, packed=1, image=halves, first=0):
    """A question about each of some pictures, which the picture answers; `packed` are one conversation."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for start in range(0, len(seeds), packed):
        turns, files = [], []
        for seed in seeds[start : start + packed]:
            files.append(f"{seed}.png")
            image(seed).save(folder / files[-1])
            turns.append({"from": "human", "value": f"<image>\n{QUESTIONS[seed // 2 % 4]}"})
            turns.append({"from": "gpt", "value": ANSWERS[seed % 2]})
        records.append({"id": f"s{first + start:03d}", "images": files, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), [*range(24)])


def learned(path, student, data, epochs, rate=1e-3):
    settings = {"lambda_align": 0, "lambda_vsd": 0, "epochs": epochs, "batch_size": 4, "learning_rate": rate}
    train(TrainConfig(student=str(student), data=str(data), out=path, **settings))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student_path, data_path):
    """A student that has learned some of the answers, so that exact match is neither 0 nor 1."""
    return learned(tmp_path_factory.mktemp("runs") / "trained", student_path, data_path, 12)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, student_path, pictures):
    """One that has learned to look."""
    return learned(tmp_path_factory.mktemp("runs") / "seeing", student_path, pictures, 16, 3e-3)


def logits_of(path, question):
    """What a model says at a question's answer tokens, without anything of ours but the encoder."""
    model = load_model(str(path), dtype=torch.float32, device=CPU)
    encoder = SampleEncoder(load_processor(str(path)))
    batch = collate([encoder(question)], encoder.pad_token_id)
    supervised = batch.pop("supervised")
    with torch.no_grad():
        logits = model(**batch).logits[predicting_positions(supervised)]
    return logits[:, : len(encoder.processor.tokenizer)], batch["input_ids"][supervised]


# ---- what is counted


@pytest.mark.parametrize("history", ["none", "full"])
def test_exact_match_equals_greedy_generation(trained, data_path, history):
    result = evaluated([trained], data_path, history=history, blind=False)
    processor, model = load_processor(str(trained)), load_model(str(trained), dtype=torch.float32, device=CPU)
    samples, hits, total = open_samples(data_path), 0, 0
    for index in range(len(samples)):
        for question in questions_of(samples[index], history):
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
    assert result.asked.questions == total == sum(result.asked.types.values())
    assert result.models[0].exact_match == pytest.approx(hits / total)
    assert result.models[0].correct.count("1") == hits
    assert 0 < hits < total


def test_agreement_and_divergence_are_those_of_the_full_distributions(teacher_path, student_path, data_path):
    result = evaluated([student_path], data_path, teacher=str(teacher_path), batch_size=5)
    agreed, divergence, tokens = 0, 0.0, 0
    samples = open_samples(data_path)
    for index in range(len(samples)):
        for question in questions_of(samples[index]):
            (theirs, ids), (ours, same_ids) = (logits_of(p, question) for p in (teacher_path, student_path))
            assert torch.equal(ids, same_ids)
            p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
            divergence += float((p.exp() * (p - q)).sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(ids)
    [score] = result.models
    assert score.kl == pytest.approx(divergence / tokens, rel=1e-4)
    assert score.top1_agreement == pytest.approx(agreed / tokens)


def test_a_teacher_agrees_with_itself_and_not_with_another(teacher_path, student_path, data_path):
    result = evaluated([teacher_path, student_path], data_path, teacher=str(teacher_path), batch_size=5)
    same, other = result.models
    assert result.teacher is not None
    assert result.teacher.top1_agreement is None
    assert same.top1_agreement == 1.0
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    assert same.exact_match == result.teacher.exact_match
    assert other.top1_agreement < 1.0
    assert other.kl > 0.0


@pytest.mark.parametrize("others", [{"batch_size": 7}, {"workers": 2, "batch_size": 3}])
def test_batches_and_workers_change_nothing(trained, teacher_path, data_path, others):
    one, many = (
        evaluated([trained], data_path, teacher=str(teacher_path), **settings).models[0]
        for settings in ({"batch_size": 1}, others)
    )
    assert one.correct == many.correct
    assert one.by_type == many.by_type
    assert one.blind == many.blind
    assert one.kl == pytest.approx(many.kl, rel=1e-4)


def test_progress_counts_every_sample_and_question_of_every_model(student_path, teacher_path, data_path):
    seen = Counter()
    result = evaluated(
        [student_path],
        data_path,
        lambda model, total, samples, questions: seen.update(
            {(model, "samples"): samples, (model, "questions"): questions, (model, total): 1}
        ),
        batch_size=4,
        teacher=str(teacher_path),
    )
    for model in map(str, (student_path, teacher_path)):
        assert seen[model, "samples"] == 12
        assert seen[model, "questions"] == result.asked.questions
        assert seen[model, 12] > 1


def test_the_data_options_are_heeded(student_path, data_path):
    result = evaluated([student_path], data_path, limit=5, dtype="bfloat16")
    assert len(result.asked.per_sample) == 5


# ---- each model by itself


def test_every_model_has_its_own_pixels_and_its_own_number_of_image_tokens(tmp_path, seeing, pictures):
    """A teacher of another resolution and other normalisation; answers are matched by their tokens."""
    processor = tiny_processor(patch_size=16)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    other = save_vlm(tmp_path / "other", processor, patch_size=16, text_width=48, seed=5)
    alone = evaluated([seeing], pictures).models[0]
    beside = evaluated([seeing], pictures, teacher=str(other))
    assert beside.models[0].correct == alone.correct
    assert beside.models[0].blind == alone.blind
    assert beside.teacher.correct == evaluated([other], pictures).models[0].correct
    swapped = evaluated([other, seeing], pictures)
    assert swapped.models[1].correct == alone.correct


def test_what_is_too_long_for_one_model_is_left_out_for_all(tmp_path, student_path, pictures):
    """A picture is 16 tokens for one of them, and 4 for the other."""
    coarse = save_vlm(tmp_path / "coarse", tiny_processor(patch_size=16), patch_size=16, seed=5)
    encoders = [SampleEncoder(load_processor(str(path))) for path in (student_path, coarse)]
    samples = open_samples(pictures)
    fine, few = ([len(encoder(samples[i])) for i in range(len(samples))] for encoder in encoders)
    most = sorted(fine)[12]
    assert max(few) <= most < max(fine)
    expected = sum(length > most for length in fine)
    rules = {"max_tokens": most, "too_long": "skip"}
    for models, teacher in (
        ([coarse], student_path),
        ([student_path], coarse),
        ([coarse, student_path], None),
    ):
        found = evaluated(models, pictures, teacher=None if teacher is None else str(teacher), **rules)
        assert found.asked.left_out.samples == expected
        assert found.asked.questions == len(samples) - expected


def test_one_model_is_in_memory_at_a_time(student_path, teacher_path, trained, data_path, monkeypatch):
    alive = []

    def loading(path, **settings):
        gc.collect()
        assert [model() for model in alive] == [None] * len(alive), f"beside {path}"
        model = load_model(path, **settings)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(model_files, "load_model", loading)
    evaluated([student_path, trained], data_path, teacher=str(teacher_path), limit=3)
    assert len(alive) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 16}, [f"{size} samples" for size in (8, 4, 2, 8, 4, 2)]),
        ({"batch_tokens": 350}, [f"{tokens} padded tokens" for tokens in (170, 75, 170, 75)]),
    ],
)
def test_batches_become_smaller_when_memory_runs_out(
    trained, teacher_path, data_path, card, caplog, changes, said
):
    expected = evaluated([trained], data_path, teacher=str(teacher_path))
    card.samples = 3
    found = evaluated([trained], data_path, teacher=str(teacher_path), **changes)
    assert found.models[0].correct == expected.models[0].correct
    assert found.models[0].kl == pytest.approx(expected.models[0].kl, rel=1e-4)
    assert [r.message for r in caplog.records if "memory ran out" in r.message] == [
        f"memory ran out: from now on at most {limits} per forward" for limits in said
    ]


def test_a_forward_has_a_number_of_padded_tokens(student_path, unequal_data, card):
    found = {}
    for name, changes in {
        "number": {"batch_size": 32},
        "measured": {},
        "said": {"batch_tokens": 700},
    }.items():
        card.batches = []
        scores = evaluated([student_path], unequal_data, history="full", **changes)
        found[name] = scores.models[0].correct, card.batches
    assert found["number"][0] == found["measured"][0] == found["said"][0]
    cells = {name: [samples * longest for samples, longest in found[name][1]] for name in found}
    assert max(cells["measured"]) <= max(cells["number"])
    assert len(cells["measured"]) < len(cells["number"])
    assert max(cells["said"]) <= 700


def test_memory_that_is_too_small_for_one_question_is_said(student_path, data_path, monkeypatch):
    def no_card(path, **settings):
        model = load_model(path, **settings)

        def full(_module, _args, _inputs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

        model.register_forward_pre_hook(full, with_kwargs=True)
        return model

    monkeypatch.setattr(model_files, "load_model", no_card)
    with pytest.raises(CachekdError, match=r"GPU's memory is too small[\s\S]*--max-tokens"):
        evaluated([student_path], data_path)


def test_a_model_whose_logits_are_no_numbers_is_refused(tmp_path, student_path, data_path):
    model = load_model(str(student_path), dtype=torch.float32, device=CPU)
    model.model.language_model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    load_processor(str(student_path)).save_pretrained(tmp_path / "broken")
    with pytest.raises(BadSample, match="not finite"):
        evaluated([tmp_path / "broken"], data_path)
    with pytest.raises(CachekdError, match="no sample can be used"):
        evaluated([student_path, tmp_path / "broken"], data_path, on_error="skip", limit=4)


# ---- what is asked


TURNS = [
    {"from": "system", "value": "be brief"},
    {"from": "human", "value": "what is <image> this?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "is it red?"},
    {"from": "gpt", "value": "yes"},
    {"from": "human", "value": "<image>\nand   this?"},
    {"from": "gpt", "value": "blue"},
]


def roles(sample):
    return [message["role"] for message in sample.messages]


def kinds(message):
    return [part["type"] for part in message["content"]]


def test_a_question_has_its_own_pictures_or_those_before_it():
    images = (noise_image(0), noise_image(1))
    sample = sample_from_llava("k", TURNS, images, origin="test")
    first, second, third = questions_of(sample)
    for one in (first, second, third):
        assert roles(one) == ["system", "user", "assistant"]
        assert len(SampleEncoder(tiny_processor())(one).token_ids) > 1
    assert kinds(first.messages[1]) == ["text", "image", "text"]
    assert kinds(second.messages[1]) == ["image", "text"]  # it has none of its own
    assert kinds(third.messages[1]) == ["image", "text"]
    assert [list(one.images) for one in (first, second, third)] == [[images[0]], [images[0]], [images[1]]]
    assert [question_text(one) for one in (first, second, third)] == [
        "what is this?",
        "is it red?",
        "and this?",
    ]
    assert [question_type(question_text(one)) for one in (first, second)] == ["what is", "is it"]


def test_with_its_history_a_question_has_all_that_came_before():
    images = (noise_image(0), noise_image(1))
    sample = sample_from_llava("k", TURNS, images, origin="test")
    asked = questions_of(sample, "full")
    assert [len(one.messages) for one in asked] == [3, 5, 7]
    assert [one.images for one in asked] == [images[:1], images[:1], images]
    for one in asked:
        assert [answer for _, answer in one.questions] == [one.messages[-1]["content"][0]["text"]]
        same = [{**message, "supervised": True} for message in one.messages]
        assert same == [{**message, "supervised": True} for message in sample.messages[: len(same)]]


def test_a_system_turn_stays_where_it_stands():
    turns = [*TURNS[1:3], {"from": "system", "value": "be longer"}, *TURNS[3:5]]
    first, second = questions_of(sample_from_llava("k", turns, (noise_image(0),), origin="test"))
    assert roles(first) == ["user", "assistant"]
    assert roles(second) == ["system", "user", "assistant"]


def test_several_turns_of_the_user_are_one_question():
    turns = [{"from": "human", "value": "<image>\nin one word:"}, *TURNS[3:5], *TURNS[5:]]
    sample = sample_from_llava("k", turns, (noise_image(0), noise_image(1)), origin="test")
    first, second = questions_of(sample)
    assert roles(first) == ["user", "user", "assistant"]
    assert question_text(first) == "in one word: is it red?"
    assert (len(first.images), len(second.images)) == (1, 1)
    record = {"conversations": turns}
    assert [one_line(text) for text, _ in preview_of_record(record).answered] == [
        question_text(question) for question in (first, second)
    ]


def test_an_answer_to_nobody_is_no_question(student_path, tmp_path):
    turns = [*TURNS[1:3], {"from": "gpt", "value": "and green"}, *TURNS[3:5]]
    sample = sample_from_llava("k", turns, (noise_image(0),), origin="test")
    assert [answer for _, answer in sample.questions] == ["red", "yes"]
    data = write_llava_json(tmp_path, 2)
    records = json.loads(data.read_text())
    records[0]["conversations"] = turns
    data.write_text(json.dumps(records))
    asked = evaluated([student_path], data).asked
    assert (asked.per_sample, asked.unasked_answers) == ([2, 2], 1)


def test_questions_about_a_picture_share_it_in_memory():
    sample = sample_from_llava("k", TURNS[1:5], (noise_image(0),), origin="test")
    found = QuestionEncoder(SampleEncoder(tiny_processor()), "none", blind=True)(sample)
    pixels = {id(one.inputs["pixel_values"]) for one in (*found.encoded, *found.blind)}
    assert len(pixels) == 2
    tokens = sum(
        x.nbytes for one in found.encoded for name, x in one.inputs.items() if name != "pixel_values"
    )
    assert found.nbytes == 2 * found.encoded[0].inputs["pixel_values"].nbytes + tokens


def test_groups_are_bounded_in_memory(trained, data_path, monkeypatch):
    expected = evaluated([trained], data_path).models[0]
    monkeypatch.setattr("cachekd.evaluate.ask.MOST_WAITING", 1)
    assert evaluated([trained], data_path).models[0] == expected


def test_questions_that_are_packed_are_answered_as_those_alone(seeing, tmp_path, pictures):
    packed = write_pictures(tmp_path / "packed", [*range(24)], packed=2)
    alone, together = (evaluated([seeing], data).models[0] for data in (pictures, packed))
    assert together.correct == alone.correct
    assert together.blind.correct == alone.blind.correct
    assert alone.exact_match > 0.6


# ---- a cache in the teacher's place


def dumped(out, teacher, data):
    dump(DumpConfig(teacher=str(teacher), data=str(data), out=out, tail="exact", batch_size=4))
    return str(out)


def test_a_cache_of_the_data_says_what_the_teacher_would(tmp_path, teacher_path, student_path, pictures):
    cache = dumped(tmp_path / "cache", teacher_path, pictures)
    live = evaluated([student_path], pictures, teacher=str(teacher_path))
    cached = evaluated([student_path], pictures, cache=cache)
    assert cached.teacher is None
    assert cached.asked == live.asked
    assert cached.models[0].top1_agreement == live.models[0].top1_agreement
    assert cached.models[0].kl == pytest.approx(live.models[0].kl, abs=2e-3)


def test_a_cache_of_conversations_answers_questions_with_their_history(
    tmp_path, teacher_path, student_path, data_path
):
    cache = dumped(tmp_path / "cache", teacher_path, data_path)
    with pytest.raises(CachekdError, match=r"within their conversation[\s\S]*--history full"):
        evaluated([student_path], data_path, cache=cache)
    live = evaluated([student_path], data_path, teacher=str(teacher_path), history="full")
    cached = evaluated([student_path], data_path, cache=cache, history="full")
    assert cached.models[0].top1_agreement == live.models[0].top1_agreement
    assert cached.models[0].kl == pytest.approx(live.models[0].kl, abs=2e-3)


@pytest.mark.parametrize("history", ["none", "full"])
def test_a_cache_with_answers_that_nobody_asked_for(tmp_path, teacher_path, student_path, pictures, history):
    """A second answer in a row, and a sample without a question."""
    records = json.loads(pictures.read_text())[:4]
    records[1]["conversations"].append({"from": "gpt", "value": "and more"})
    records[2] = {
        "id": "nobody",
        "conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}],
    }
    data = pictures.parent / f"unasked-{history}.json"
    data.write_text(json.dumps(records))
    cache = dumped(tmp_path / "cache", teacher_path, data)
    live = evaluated([student_path], data, teacher=str(teacher_path), history=history)
    cached = evaluated([student_path], data, cache=cache, history=history)
    assert cached.asked == live.asked
    assert (live.asked.per_sample, live.asked.unasked_answers) == ([1, 1, 1], 2)
    assert cached.models[0].top1_agreement == live.models[0].top1_agreement
    assert cached.models[0].kl == pytest.approx(live.models[0].kl, abs=2e-3)
    assert cached.models[0].agrees_with == live.models[0].agrees_with == str(teacher_path)


def test_a_cache_of_other_data_is_refused(tmp_path, teacher_path, student_path, pictures):
    cache = dumped(tmp_path / "cache", teacher_path, pictures)
    changed = write_pictures(tmp_path / "changed", [*range(24)], image=lambda seed: halves(seed + 1))
    with pytest.raises(CachekdError, match="the sample's text or image differs"):
        evaluated([student_path], changed, cache=cache)
    more = write_pictures(tmp_path / "more", [*range(26)])
    with pytest.raises(CachekdError, match=r"lacks samples[\s\S]*2 are missing, the first is 's024'"):
        evaluated([student_path], more, cache=cache)
    none = write_pictures(tmp_path / "none", [*range(30, 32)], first=30)
    with pytest.raises(CachekdError, match=r"lacks samples[\s\S]*2 are missing"):
        evaluated([student_path], none, cache=cache, on_error="skip")
    found = evaluated([student_path], more, cache=cache, on_error="skip")
    assert found.asked.left_out.samples == 2
    assert found.asked.fingerprint == evaluated([student_path], pictures).asked.fingerprint


def test_a_teacher_and_its_cache_are_one_too_many(student_path):
    with pytest.raises(CachekdError, match="a cache takes the place of the teacher"):
        EvalConfig(models=["m"], data="d", teacher=str(student_path), cache="c")


# ---- what a picture is worth


def test_blind_is_the_same_model_on_pictures_of_one_colour(tmp_path, seeing, pictures):
    def mean(seed):
        image = halves(seed)
        colour = np.asarray(image, np.float64).mean((0, 1)).round().astype(int).tolist()
        return Image.new("RGB", image.size, tuple(colour))

    grey = write_pictures(tmp_path / "grey", [*range(24)], image=mean)
    blind = evaluated([seeing], pictures).models[0].blind
    shown = evaluated([seeing], grey).models[0]
    assert blind.correct == shown.correct == shown.blind.correct
    assert blind.by_type == shown.by_type
    assert blind.exact_match < evaluated([seeing], pictures).models[0].exact_match


def test_blinding_keeps_the_size():
    sample = sample_from_llava("k", TURNS[1:3], (noise_image(0, (40, 20)),), origin="test")
    [image] = blinded(sample).images
    assert (image.size, image.getextrema()) == ((40, 20), tuple((c, c) for c in image.getpixel((0, 0))))


def test_without_pictures_nothing_is_blind(student_path, tmp_path):
    record = {
        "id": "a",
        "conversations": [{"from": "human", "value": "so?"}, {"from": "gpt", "value": "yes"}],
    }
    (tmp_path / "data.json").write_text(json.dumps([record]))
    assert evaluated([student_path], tmp_path / "data.json").models[0].blind is None
    assert evaluated([student_path], tmp_path / "data.json", blind=False).models[0].blind is None


SEEN = [
    ("is it red?", "yes"),
    ("is it red?", "no"),
    ("is  it red?", "no "),
    ("is it blue?", "yes"),
    ("is it green?", "yes"),
    ("what colour?", "red"),
    ("where?", "here"),
    ("where?", "here"),
    ("where?", "there"),
]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("is it red?", "no"),
        ("is it round?", "yes"),
        ("what colour?", "red"),
        ("who?", "yes"),
        ("where?", "here"),
    ],
)
def test_the_prior_answers_by_the_question_then_by_its_type_then_by_all(question, answer):
    assert AnswerPrior(SEEN).answer(question) == answer


def test_the_prior_of_nothing_says_nothing():
    assert AnswerPrior([]).answer("is it red?") == ""


def test_the_prior_needs_no_key_and_no_pictures(student_path, pictures, tmp_path):
    """So the training data may be in another form than the test data."""
    records = json.loads(pictures.read_text())
    renamed = [{"uid": r["id"], "shot": r["images"], "conversations": r["conversations"]} for r in records]
    test = pictures.parent / "renamed.json"
    test.write_text(json.dumps(renamed))
    seen = tmp_path / "seen.json"
    seen.write_text(json.dumps([{"conversations": r["conversations"]} for r in records]))
    found = evaluated([student_path], test, key="uid", image_field="shot", prior_data=str(seen))
    assert found.prior.correct == evaluated([student_path], pictures, prior_data=str(pictures)).prior.correct


def test_a_map_that_fails_on_the_priors_data_is_said(student_path, pictures, tmp_path, monkeypatch):
    (tmp_path / "priormap.py").write_text("def f(record): return {**record, 'x': record['images'][0]}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = tmp_path / "seen.json"
    seen.write_text(
        json.dumps([{"conversations": r["conversations"]} for r in json.loads(pictures.read_text())])
    )
    with pytest.raises(CachekdError, match="KeyError"):
        evaluated([student_path], pictures, map="priormap:f", prior_data=str(seen))


def test_the_prior_does_not_depend_on_the_order():
    seen = [("who?", "b"), ("who?", "a"), ("who?", "c"), ("who?", "c"), ("who?", "a")]
    assert AnswerPrior(seen).answer("who?") == AnswerPrior(seen[::-1]).answer("who?") == "a"


def test_records_that_tell_the_prior_nothing_are_counted(student_path, pictures, tmp_path):
    records = json.loads(pictures.read_text())
    (tmp_path / "some.json").write_text(json.dumps([*records, {"id": "x"}, {"id": "y", "conversations": 3}]))
    found = evaluated([student_path], pictures, prior_data=str(tmp_path / "some.json"), limit=2)
    assert found.prior_left_out == 2
    assert (
        found.prior.exact_match
        == evaluated([student_path], pictures, prior_data=str(pictures)).prior.right[:2].mean()
    )
    (tmp_path / "none.json").write_text(json.dumps([{"id": "x", "conversations": []}]))
    with pytest.raises(CachekdError, match=r"nothing is asked and answered[\s\S]*1 others"):
        evaluated([student_path], pictures, prior_data=str(tmp_path / "none.json"))


def test_the_priors_row_is_what_counting_gives(student_path, pictures, tmp_path):
    seen = write_pictures(tmp_path / "seen", [0, 1, 2, 5, 6, 9, 13, 17])
    result = evaluated([student_path], pictures, prior_data=str(seen))
    answers, samples = {}, open_samples(seen)
    for index in range(len(samples)):
        [((message,), answer)] = samples[index].questions
        answers.setdefault(message["content"][-1]["text"], Counter())[answer] += 1
    tests, hits = open_samples(pictures), 0
    for index in range(len(tests)):
        [((message,), answer)] = tests[index].questions
        text = message["content"][-1]["text"]
        known = answers.get(text) or answers[QUESTIONS[0]]  # the only question of its type that was seen
        hits += known.most_common(1)[0][0] == answer
    assert result.prior.exact_match == hits / 24
    assert result.prior.name == str(seen)


# ---- a score belongs to its questions


def test_questions_have_the_same_fingerprint_in_any_order_and_place(student_path, pictures, tmp_path):
    same = write_pictures(tmp_path / "same", [*range(24)])
    whole = evaluated([student_path], pictures).asked
    assert evaluated([student_path], same, shuffle_seed=3).asked.fingerprint == whole.fingerprint
    for others in ({"limit": 23}, {"history": "full"}):
        assert evaluated([student_path], pictures, **others).asked.fingerprint != whole.fingerprint
    changed = write_pictures(tmp_path / "other", [*range(24)], image=lambda seed: halves(seed + 1))
    assert evaluated([student_path], changed).asked.fingerprint != whole.fingerprint


def test_the_command_keeps_scores_apart_and_prints_what_they_are_worth(
    seeing, student_path, pictures, data_path
):
    words = ["eval", str(seeing), str(student_path), "--prior-data", str(pictures)]
    first = CliRunner().invoke(app, [*words, "--data", str(pictures)])
    second = CliRunner().invoke(app, [*words, "--data", str(data_path), "--limit", "4", "--json"])
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    for text in ("24 questions about 24 samples", "blind", "prior", "95 % interval"):
        assert text in first.stdout
    found = json.loads(second.stdout)
    assert {d["against"] for d in found["differences"]} >= {"prior", f"{student_path}, blind"}
    newest, other = read_scores(seeing)
    assert (newest.asked.data, other.asked.data) == (str(data_path), str(pictures))
    assert newest.models[0].exact_match == found["models"][0]["exact_match"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch-size", "0"),
        ("batch-size", "-1"),
        ("workers", "-1"),
        ("limit", "0"),
        ("history", "some"),
        ("dtype", "int8"),
    ],
)
def test_settings_out_of_range_are_refused(student_path, pictures, option, value):
    done = CliRunner().invoke(app, ["eval", str(student_path), "--data", str(pictures), f"--{option}", value])
    assert isinstance(done.exception, CachekdError)
    assert option.replace("-", "_") in str(done.exception)


@pytest.mark.parametrize("family", FAMILIES)
def test_blind_questions_are_encoded_as_if_each_were_encoded_by_itself(family):
    encoder = SampleEncoder(FAMILIES[family].processor())
    alone = family == "paligemma"  # which takes one question
    turns = TURNS[1:3] if alone else TURNS[1:]
    images = (noise_image(0, (40, 32)), noise_image(1, (32, 48)))[: 1 if alone else 2]
    sample = sample_from_llava("k", turns, images, origin="test")
    expected = [encoder(question) for question in questions_of(blinded(sample))]
    found = QuestionEncoder(encoder, "none", blind=True)(sample)
    for one, other, seen in zip(found.blind, expected, found.encoded, strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        for name, value in one.inputs.items():
            assert torch.equal(value, other.inputs[name]), name
        assert torch.equal(one.supervised, other.supervised)
        assert any(not torch.equal(one.inputs[name], value) for name, value in seen.inputs.items())


def test_every_type_of_question_has_its_share_and_a_table_the_frequent_ones(student_path, tmp_path):
    """Of rare ones the report would have nothing to show."""
    data = write_pictures(tmp_path, [*range(15)])
    records = json.loads(data.read_text())
    for number, record in enumerate(records):
        record["conversations"][0]["value"] = f"<image>kind{number:02d} of question?"
    data.write_text(json.dumps(records))
    done = CliRunner().invoke(app, ["eval", str(student_path), "--data", str(data)], env={"COLUMNS": "200"})
    assert done.stdout.count("kind") == MAX_TYPES == 12
    result = evaluated([student_path], data)
    assert result.models[0].by_type.keys() == result.asked.types.keys()
    assert len(result.asked.types) == 15


# ---- what is refused before any model is loaded


@pytest.fixture
def no_model(monkeypatch):
    def loading(path, **_settings):
        raise AssertionError(f"{path} was loaded")

    monkeypatch.setattr(model_files, "load_model", loading)


def test_a_model_is_named_once(student_path):
    with pytest.raises(CachekdError, match="is named twice"):
        read_config(None, EvalConfig, {"models": ["runs/a", "runs/a/"], "data": "d"})


def test_a_later_models_template_is_tried_first(no_model, tmp_path, student_path, pictures):
    template = MARKED_TEMPLATE.replace("[0]['text'] }}", "[0]['text'] | upper }}")
    assert template != MARKED_TEMPLATE
    odd = save_vlm(tmp_path / "odd", tiny_processor(template=template))
    with pytest.raises(CachekdError, match="answer"):
        evaluated([student_path, odd], pictures)


@pytest.mark.parametrize("content", ["{", None])
def test_scores_that_could_not_be_kept_are_known_first(no_model, tmp_path, pictures, student_path, content):
    run = shutil.copytree(student_path, tmp_path / "run")
    (run / RUN_FILE).write_text("{}")
    if content is None:
        (run / EVALUATIONS_FOLDER).write_text("")
    else:
        (run / EVALUATIONS_FOLDER).mkdir()
        (run / EVALUATIONS_FOLDER / "a.json").write_text(content)
    done = CliRunner().invoke(app, ["eval", str(run), "--data", str(pictures)])
    assert isinstance(done.exception, CachekdError)


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / seed / "kd" for seed in ("seed0", "seed1")]
    assert shortest(paths) == ["seed0/kd", "seed1/kd"]
    assert shortest([paths[0], tmp_path / "ce"]) == ["kd", "ce"]
    assert shortest([]) == []
