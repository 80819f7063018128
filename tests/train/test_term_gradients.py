"""The size of each term's gradient by part: right, seen, and without a trace in the training."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.losses.terms import TERMS
from cachekd.models import load_model
from cachekd.models.parts import parameters_by_part
from cachekd.paths import RUN_FILE
from cachekd.report import build_report, read_run
from cachekd.train import train
from cachekd.train.batch import collate_with_targets
from cachekd.train.open import make_trainer
from cachekd.train.term_gradients import gradient_name
from caches import cached

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(pair) -> dict:
    shared, folder = pair
    return shared | {"epochs": 1, "cache": str(cached(shared, folder, tail="exact"))}


def logged(config: TrainConfig) -> list[dict]:
    entries = json.loads((config.out / RUN_FILE).read_text())["log"]
    return [entry for entry in entries if "loss" in entry]


def gradients_of(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name.startswith("gradient_")}


def test_they_are_the_norms_of_the_means_gradients(settings, tmp_path):
    """Against a backward of each term alone, per answer token, without its weight."""
    config = TrainConfig(**settings, out=tmp_path / "x", log_term_gradients=True, lambda_align=0.25)
    trainer = make_trainer(config, tmp_path / "t")
    batch = collate_with_targets([trainer.train_dataset[index] for index in range(4)], 0)
    loss = trainer.compute_loss(trainer.model, batch)
    found = trainer.gradients.logged()
    expected = {}
    for name in TERMS:
        trainer.model.zero_grad()
        terms = trainer.terms_of(trainer.model, batch)
        (terms.terms[name] / terms.tokens).backward()
        for part, parameters in parameters_by_part(trainer.vlm).items():
            flat = [p.grad.flatten() for p in parameters.values() if p.grad is not None]
            if flat:
                expected[gradient_name(name, part)] = torch.cat(flat).norm().item()
    assert found == pytest.approx(expected, rel=1e-4)
    assert [name for name in found if "vsd" in name] == ["gradient_vsd_vision_encoder"]
    trainer.model.zero_grad()
    loss.backward()  # the graph is whole


HOW = {
    "plain": {},
    "chunks, accumulated": {"logit_chunk": 3, "batch_size": 2, "gradient_accumulation": 2},
    "layers recomputed": {"gradient_checkpointing": True},
    "adapters": {"lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.2}},
    "bfloat16": {"dtype": "bfloat16"},
    "one part": {"trainable": "language_model", "lambda_vsd": 0},
    "now and then": {"vsd_every": 3, "logging_steps": 2},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_training_does_not_notice(settings, tmp_path, how):
    """Bit by bit, whatever else is set."""
    students, logs = [], []
    for on in (False, True):
        config = TrainConfig(
            **settings | {"learning_rate": 1e-3} | how, out=tmp_path / str(on), log_term_gradients=on
        )
        summary = train(config)
        students.append(load_model(str(config.out), dtype=torch.float32, device=CPU).state_dict())
        logs.append(logged(config))
    for name, weight in students[0].items():
        assert torch.equal(weight, students[1][name]), name
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]]
    assert not gradients_of(logs[0][0])
    assert all(gradients_of(entry) for entry in logs[1])
    assert gradients_of(logs[1][0])[gradient_name("ce", "language_model")] > 0
    seen = {name for entry in logs[1] for name in gradients_of(entry)}
    parts = [part for part in parameters_by_part(student_of(config)) if part in config.trainable]
    assert seen >= {gradient_name("align", part) for part in parts}
    assert (gradient_name("vsd", "vision_encoder") in seen) == config.switches
    assert summary.gradients["ce"]["language_model"] > 0


def student_of(config: TrainConfig):
    return load_model(config.student, dtype=torch.float32, device=CPU)


def test_a_term_that_does_nothing_is_seen(settings, tmp_path, caplog):
    config = TrainConfig(
        **settings | {"epochs": 2}, out=tmp_path / "x", log_term_gradients=True, lambda_align=1e-6
    )
    with caplog.at_level(logging.WARNING):
        train(config)
    told = [record.getMessage() for record in caplog.records if "next to nothing" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("L_Align does next to nothing: in 5 log entries")
    assert "lambda_align" in told[0]
    page = build_report(read_run(config.out), [])
    assert "L_VSD at the vision encoder" in page


def test_a_short_run_is_told_of_it_at_its_end(settings, tmp_path, caplog):
    config = TrainConfig(**settings, out=tmp_path / "x", log_term_gradients=True, lambda_vsd=1e-6)
    with caplog.at_level(logging.WARNING):
        train(config)
    assert "L_VSD does next to nothing: in 4 log entries" in caplog.text
    assert "L_Align does" not in caplog.text


def test_a_compiled_student_is_refused(settings, tmp_path):
    compiled = {"lambda_vsd": 0, "training": {"torch_compile": True}}
    config = TrainConfig(**settings, **compiled, out=tmp_path / "x", log_term_gradients=True)
    with pytest.raises(CachekdError, match="gradient of a single term") as caught:
        make_trainer(config, tmp_path / "t")
    assert caught.value.found == "torch_compile"
