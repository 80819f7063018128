"""Images are some tokens in the text, and not the same number for teacher and student."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch

from cachekd.cache import LogitCache
from cachekd.config import DumpConfig, TrainConfig
from cachekd.data import Sample, SampleEncoder, collate, open_samples, predicting_positions
from cachekd.data.conversation import messages_from_turns
from cachekd.data.supervision import expand_images
from cachekd.dump import dump
from cachekd.errors import BadSample
from cachekd.losses import cross_entropy_loss, dbild_loss
from cachekd.losses.targets import DenseTargets
from cachekd.models import load_model, load_processor, logits_at
from cachekd.models.fingerprint import image_processor_fingerprint
from cachekd.paths import RUN_FILE
from cachekd.train import train
from cachekd.train.batch import collate_with_targets
from cachekd.train.open import make_trainer
from tiny import noise_image, save_vlm, tar_members, tiny_processor, tiny_vlm, write_tar
from tiny_families import FAMILIES

CPU = torch.device("cpu")
TURNS = [
    {"role": "user", "content": "\n\nwhat <image> is\n\n<image>\n\nred or <image>"},
    {"role": "assistant", "content": "a large green dog."},
    {"role": "user", "content": "and <image>\n\n?"},
    {"role": "assistant", "content": "no"},
]
WITH_TEMPLATE = [name for name in FAMILIES if name != "paligemma"]  # whose answers are a suffix


def many_images() -> Sample:
    sizes = [(32, 32), (64, 32), (32, 96), (80, 80)]
    images = tuple(noise_image(index, size) for index, size in enumerate(sizes))
    return Sample("k", images, tuple(messages_from_turns(TURNS, len(images), "test")), "test")


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_what_changes_an_images_tokens_changes_the_fingerprint(name):
    """Every number of the processor's own: whichever of them has another, it is seen."""
    sample = many_images()
    numbers = {
        setting: value
        for setting, value in vars(FAMILIES[name].processor()).items()
        if type(value) is int and not setting.endswith("_id")
    }
    for setting, value in numbers.items():
        processor = FAMILIES[name].processor()
        before = SampleEncoder(processor)(sample).inputs["input_ids"].tolist()
        fingerprint = image_processor_fingerprint(processor)
        setattr(processor, setting, 4 * value)
        same = SampleEncoder(processor)(sample).inputs["input_ids"].tolist() == before
        assert same or image_processor_fingerprint(processor) != fingerprint, setting


def test_other_settings_of_an_images_tokens_change_the_fingerprint():
    """Gemma 3 writes its tokens out when it is made; LLaVA-OneVision's limit of tiles is a text."""
    gemma = FAMILIES["gemma3"].processor()
    other = type(gemma)(
        gemma.image_processor, gemma.tokenizer, chat_template=gemma.chat_template, image_seq_length=9
    )
    lengths = [len(SampleEncoder(each)(many_images())) for each in (gemma, other)]
    assert lengths[1] - lengths[0] == 4 * (9 - gemma.image_seq_length)
    assert image_processor_fingerprint(gemma) != image_processor_fingerprint(other)
    one, nine = (FAMILIES["llava_onevision"].processor() for _ in range(2))
    one.vision_aspect_ratio = "anyres_max_1"
    assert image_processor_fingerprint(one) != image_processor_fingerprint(nine)


def test_a_processor_without_such_settings_keeps_the_fingerprint_that_it_had():
    processor = tiny_processor()
    settings = {name: value for name, value in processor.image_processor.to_dict().items() if name[0] != "_"}
    grid = {"patch_size": 8, "num_additional_image_tokens": 1}
    parts = [type(processor.image_processor).__name__, settings, grid, "default"]
    text = json.dumps(parts, sort_keys=True, default=str)
    assert image_processor_fingerprint(processor) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_only_images_expand_and_everything_between_them_reappears(name):
    """Row marks, separators and line breaks of an image are no one's answer, whatever they merge with."""
    processor = FAMILIES[name].processor()
    encoded = SampleEncoder(processor)(many_images())
    ids = encoded.inputs["input_ids"].tolist()
    tokenizer = processor.tokenizer
    text = tokenizer.decode(ids)
    image = re.escape(processor.image_token)
    plain = tokenizer.apply_chat_template(
        list(many_images().messages), chat_template=processor.chat_template, tokenize=False
    )
    between = re.split(image, plain)
    assert len(between) == 5
    # Each stretch of text in its turn, and nothing of the images behind the last one.
    at = 0
    for part in between:
        found = text.find(part, at)
        assert found >= at
        at = found + len(part)
    assert at == len(text)
    answers = ["a large green dog.<|end|>", "no<|end|>"]
    assert tokenizer.decode(encoded.token_ids) == "".join(answers)
    # The masked tokens stand at the answers' places, and nowhere else.
    starts = [sum(len(tokenizer.decode([i])) for i in ids[:k]) for k in range(len(ids))]
    spans = [(text.index(f"\n{answer}") + 1, len(answer)) for answer in answers]
    expected = [any(first <= start < first + length for first, length in spans) for start in starts]
    assert encoded.supervised.tolist() == expected
    assert len(ids) > len(tokenizer(plain)["input_ids"])


def test_line_breaks_of_an_image_that_merge_with_the_text_around_it():
    """Gemma 3 puts two line breaks around each image; tokenised alone, the text would be other tokens."""
    processor = FAMILIES["gemma3"].processor()
    encoded = SampleEncoder(processor)(many_images())
    assert processor.tokenizer.decode(encoded.token_ids) == "a large green dog.<|end|>no<|end|>"


def test_a_processor_that_changes_more_than_images_is_refused():
    sample = many_images()
    replaced = [{"span": (2, 5), "text": "<i>", "replacement": "<i><i>"}]
    one = Sample("k", sample.images[:1], sample.messages, "test")
    assert expand_images("ab<i>cd", [(0, 1), (5, 7)], replaced, one) == ("ab<i><i>cd", [(0, 1), (8, 10)])
    with pytest.raises(BadSample, match="beyond the images"):
        expand_images("ab <i>cd", [(5, 7)], replaced, one)
    with pytest.raises(BadSample, match="beyond the images") as caught:
        expand_images("ab<i>cd", [(5, 7)], replaced, sample)
    assert "4 placeholder(s)" in str(caught.value)


# ---- a teacher of 16 image tokens and a student of 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    processor = tiny_processor(patch_size=8)
    teacher = tiny_vlm(processor, text_width=48, seed=1)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(15)  # a teacher that has opinions, and other ones at each token
    teacher.save_pretrained(folder / "teacher")
    processor.save_pretrained(folder / "teacher")
    student = {"patch_size": 16, "tower": "siglip"}
    save_vlm(folder / "student", tiny_processor(patch_size=16, class_token=False), seed=2, **student)
    data = write_tar(folder / "data.tar", tar_members(8))
    cache = folder / "cache"
    dump(DumpConfig(teacher=str(folder / "teacher"), data=str(data), out=cache, tail="exact", batch_size=4))
    return TrainConfig(
        student=str(folder / "student"),
        data=str(data),
        cache=cache,
        out=folder / "run",
        lambda_align=10,
        lambda_vsd=0,
        batch_size=4,
        epochs=8,
        learning_rate=5e-3,
        logging_steps=1,
    )


def test_a_student_with_fewer_image_tokens_meets_the_right_targets(pair, tmp_path):
    """Against live logits of the teacher on its own, longer inputs; aligned answer token by answer token."""
    trainer = make_trainer(pair, tmp_path)
    batch = collate_with_targets([trainer.train_dataset[i] for i in range(4)], 0)
    loss = trainer.compute_loss(trainer.model, batch)

    teacher_path = LogitCache(pair.cache).manifest.teacher.name
    samples = open_samples(pair.data)
    encoded, logits = {}, {}
    for name, path in (("teacher", teacher_path), ("student", pair.student)):
        encoder = SampleEncoder(load_processor(path))
        encoded[name] = [encoder(samples[i]) for i in range(4)]
        inputs = collate(encoded[name], 0)
        positions = predicting_positions(inputs.pop("supervised"))
        with torch.no_grad():
            logits[name] = logits_at(load_model(path, dtype=torch.float32, device=CPU), inputs, positions)
    for long, short in zip(encoded["teacher"], encoded["student"], strict=True):
        assert torch.equal(long.token_ids, short.token_ids)
        assert len(long) - len(short) == 16 - 4
    answers = torch.cat([sample.token_ids for sample in encoded["student"]])
    vocab = batch.targets.vocab_size
    live = DenseTargets(logits["teacher"][:, :vocab], answers)
    own = logits["student"][:, :vocab]
    align = dbild_loss(own, live, temperature=3.0, window=batch.targets.window)
    expected = cross_entropy_loss(logits["student"], answers) + 10 * align
    torch.testing.assert_close(loss.detach(), expected, rtol=5e-3, atol=1e-4)  # the cache rounds
    # One token to the side would be noticed.
    shifted = DenseTargets(logits["teacher"][:, :vocab].roll(1, 0), answers)
    other = dbild_loss(own, shifted, temperature=3.0, window=batch.targets.window)
    assert float((align - other).abs()) > float((loss.detach() - expected).abs())


def test_such_a_pair_trains(pair):
    summary = train(pair)
    assert summary.steps == 16
    log = json.loads((pair.out / RUN_FILE).read_text())["log"]
    assert summary.terms["align"] < 0.8 * log[0]["align"]
