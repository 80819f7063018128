"""Stage two: the right loss, in the right places, on the right samples."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cachekd.config import TrainConfig
from cachekd.data import predicting_positions
from cachekd.errors import CachekdError
from cachekd.losses import cross_entropy_loss, dbild_loss
from cachekd.models import capture_vision, load_model, load_processor, logits_at
from cachekd.paths import RUN_FILE
from cachekd.train import train
from cachekd.train.batch import collate_with_targets
from cachekd.train.open import make_trainer
from tiny import save_vlm, tar_members, tiny_processor, write_tar

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path, student_path, teacher_path, data_path, cache_path) -> TrainConfig:
    return TrainConfig(
        student=str(student_path),
        teacher=str(teacher_path),
        data=data_path,
        cache=cache_path,
        out=tmp_path / "run",
        batch_size=4,
        epochs=2,
        learning_rate=1e-3,
        logging_steps=1,
    )


def plain_batch(trainer, indices):
    """A batch, and what the model takes of it."""
    batch = collate_with_targets([trainer.train_dataset[i] for i in indices], 0)
    return batch, batch.student.tensors


def test_the_loss_is_the_papers_sum(config, tmp_path):
    """Against the three terms computed one after the other from whole models."""
    config = config.model_copy(update={"lambda_align": 0.7, "lambda_vsd": 0.3})
    trainer = make_trainer(config, tmp_path / "t")
    batch, inputs = plain_batch(trainer, range(3))
    loss = trainer.compute_loss(trainer.model, batch)

    student = load_model(config.student, dtype=torch.float32, device=CPU)
    teacher = load_model(config.teacher, dtype=torch.float32, device=CPU)
    teacher.model.vision_tower = student.model.vision_tower
    positions, targets = predicting_positions(batch.student.supervised), batch.targets
    settings = {"window": targets.window, "min_k": targets.min_k, "temperature": 3.0}
    own, switched = (logits_at(m, inputs, positions) for m in (student, teacher))
    vocab = targets.vocab_size
    expected = (
        cross_entropy_loss(own, targets.token_ids)
        + 0.7 * dbild_loss(own[:, :vocab], targets, **settings)
        + 0.3 * dbild_loss(switched[:, :vocab], targets, **settings)
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("live", [False, True])
def test_chunks_under_autocast_are_the_whole(config, tmp_path, live):
    """In bfloat16: the head's weights are cast once around all chunks, a live float32 teacher's never."""
    changed = {"dtype": "bfloat16", "live_teacher": live, "cache": None if live else config.cache}
    losses, gradients = [], []
    for chunk in (None, 2):
        changed |= {"logit_chunk": chunk}
        trainer = make_trainer(config.model_copy(update=changed), tmp_path / str(chunk))
        if live:
            trainer.teacher.model.float()
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(
            torch.cat([p.grad.flatten() for p in trainer.vlm.parameters() if p.grad is not None])
        )
        expected = torch.float32 if live else torch.bfloat16
        assert trainer.teacher.model.dtype == expected
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_vsd_reaches_the_vision_encoder_only_and_the_teacher_stays(config, tmp_path):
    trainer = make_trainer(config, tmp_path / "t")
    teacher = trainer.teacher.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    batch, _ = plain_batch(trainer, range(3))
    terms = trainer.terms_of(trainer.model, batch).terms
    terms["vsd"].backward()
    touched = {
        name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert touched
    assert all(name.startswith("model.vision_tower.") for name in touched)
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize("lambda_vsd", [0.0, 1.0])
def test_accumulation_does_not_change_the_update(config, tmp_path, lambda_vsd):
    """12 samples of unequal length as 1 x 12 and as 3 x 4: one step, the same weights."""
    weights = []
    for name, batch_size, accumulation in (("whole", 12, 1), ("parts", 4, 3)):
        changed = {"batch_size": batch_size, "gradient_accumulation": accumulation, "epochs": 1}
        changed |= {"lambda_vsd": lambda_vsd, "warmup": 0.0, "max_grad_norm": 0.0}
        trainer = make_trainer(config.model_copy(update=changed), tmp_path / name)
        grads = {}

        def keep(optimizer, _args, _kwargs, trainer=trainer, grads=grads):
            grads.update(
                {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
            )

        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(keep)
        trainer.train()
        assert trainer.state.global_step == 1
        weights.append(grads)
    assert weights[0].keys() == weights[1].keys()
    for name, gradient in weights[0].items():
        torch.testing.assert_close(weights[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_run_is_saved_as_a_plain_model(config):
    summary = train(config)
    assert summary.steps == 6
    student = AutoModelForImageTextToText.from_pretrained(config.out)
    start = AutoModelForImageTextToText.from_pretrained(config.student)
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True))
    processor = AutoProcessor.from_pretrained(config.out)
    assert processor.chat_template == load_processor(config.student).chat_template
    assert set(student.state_dict()) == set(start.state_dict())  # nothing of the teacher
    run = json.loads((config.out / RUN_FILE).read_text())
    assert run["config"]["lambda_vsd"] == 1.0
    first = run["log"][0]
    assert first["loss"] == pytest.approx(first["ce"] + first["align"] + first["vsd"], rel=1e-3)
    assert not list(config.out.parent.glob(".run*"))


def test_the_same_seed_gives_the_same_student(config, tmp_path):
    for name in ("a", "b"):
        train(config.model_copy(update={"out": tmp_path / name}))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_plain_cross_entropy_needs_neither_teacher_nor_cache(config):
    changed = {"lambda_align": 0.0, "lambda_vsd": 0.0, "teacher": None, "cache": None}
    summary = train(config.model_copy(update=changed))
    assert set(summary.terms) == {"ce"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache": None}, "need the teacher's cached logits"),
        ({"teacher": None}, "through the teacher's projector"),
    ],
)
def test_what_a_term_needs_is_asked_for(config, changed, message):
    with pytest.raises(CachekdError, match=message):
        train(config.model_copy(update=changed))
    assert not config.out.exists()


def test_a_frozen_vision_encoder_is_refused_for_vsd(config, tmp_path):
    trainer = make_trainer(config, tmp_path / "t")
    trainer.model.model.vision_tower.requires_grad_(False)
    with pytest.raises(CachekdError, match="no gradient"):
        trainer.train()


def test_changed_samples_are_named(config, tmp_path):
    answers, pixels = tmp_path / "answers", tmp_path / "pixels"
    members = tar_members(12)
    changed = list(members)
    changed[7] = (members[7][0], members[7][1].replace(b"red", b"blue").replace(b"yes", b"maybe"))
    write_tar(answers / "0.tar", changed)
    with pytest.raises(CachekdError, match="answer tokens differ") as caught:
        train(config.model_copy(update={"data": answers}))
    assert "s003" in str(caught.value)
    changed[7] = members[7]
    changed[8] = (members[8][0], members[0][1])
    write_tar(pixels / "0.tar", changed)
    with pytest.raises(CachekdError, match="text or image differs") as caught:
        train(config.model_copy(update={"data": pixels}))
    assert "s004" in str(caught.value)
    assert not config.out.exists()
    assert not list(tmp_path.glob(".run*"))


def test_samples_that_were_not_dumped_are_named(config, tmp_path):
    write_tar(tmp_path / "more" / "0.tar", tar_members(14))
    with pytest.raises(CachekdError, match="lacks samples") as caught:
        train(config.model_copy(update={"data": tmp_path / "more"}))
    assert "2 are missing, the first is 's012'" in str(caught.value)


def test_a_part_of_the_dumped_data_is_enough(config, tmp_path):
    write_tar(tmp_path / "less" / "0.tar", tar_members(5))
    assert train(config.model_copy(update={"data": tmp_path / "less"})).steps == 4


def test_another_tokenizer_or_template_is_refused(config, tmp_path):
    other = save_vlm(tmp_path / "other", tiny_processor(corpus=["zebra quagga okapi"] * 9), seed=2)
    with pytest.raises(CachekdError, match="different tokenizer"):
        train(config.model_copy(update={"student": str(other)}))
    template = tiny_processor().chat_template + "{# another #}"
    other = save_vlm(tmp_path / "template", tiny_processor(template=template), seed=2)
    with pytest.raises(CachekdError, match="different chat template"):
        train(config.model_copy(update={"student": str(other)}))


def test_a_student_of_another_vision_width_is_refused(config, tmp_path):
    wide = save_vlm(tmp_path / "wide", tiny_processor(), vision_width=64)
    with pytest.raises(CachekdError, match="vision width"):
        train(config.model_copy(update={"student": str(wide)}))
    assert train(config.model_copy(update={"student": str(wide), "lambda_vsd": 0.0})).steps == 6


def test_a_students_padded_vocabulary_just_works(config, tmp_path):
    padded = save_vlm(tmp_path / "padded", tiny_processor(), vocab_size=448)
    assert train(config.model_copy(update={"student": str(padded)})).steps == 6


def test_vision_runs_once_per_step(config, tmp_path):
    trainer = make_trainer(config, tmp_path / "t")
    calls = []
    trainer.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 1 + trainer.state.global_step == 7  # before the first its gradients are tried
    with capture_vision(trainer.model) as vision:
        assert vision.output is None
