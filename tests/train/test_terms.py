"""A term of the loss is one entry of a table; a batch is one object; what is private in the Trainer."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections import Counter
from io import StringIO

import pytest
import torch
from pydantic import Field
from rich.console import Console
from transformers import Trainer
from transformers import trainer as transformers_trainer

import cachekd_cli.train as command
from cachekd.config import TrainConfig
from cachekd.config.losses import ForwardKL, TermLoss
from cachekd.errors import CachekdError
from cachekd.losses import forward_kl_loss
from cachekd.losses.terms import TERMS, Term
from cachekd.paths import RUN_FILE
from cachekd.report import build_report, read_run
from cachekd.report.runs import term_shares
from cachekd.train import SwitchKDTrainer, train
from cachekd.train.batch import Fault, collate_with_targets
from cachekd.train.callbacks import RunStopped
from cachekd.train.open import make_trainer
from cachekd.train.terms import LossTerms


@pytest.fixture
def settings(settings) -> dict:
    return settings | {"epochs": 1}


KL = Term("L_KL", "forward KL over the whole vocabulary")


class WithKL(TrainConfig):
    kl: TermLoss = Field(ForwardKL(), description="the loss of L_KL")
    lambda_kl: float = Field(0.0, ge=0, description="weight of L_KL")


# ---- terms


def test_every_term_has_a_weight_and_a_loss_among_the_settings_and_every_weight_a_term():
    weights = {name for name in TrainConfig.model_fields if name.startswith("lambda_")}
    assert weights == {f"lambda_{name}" for name in TERMS} - {"lambda_ce"}
    assert {name for name, term in TERMS.items() if term.taught} <= TrainConfig.model_fields.keys()
    assert TrainConfig.model_construct(lambda_align=0.5, lambda_vsd=0.0).terms == ("ce", "align")


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_term_more_is_trained_summed_logged_evaluated_and_reported(settings, monkeypatch, chunk):
    """Forward KL, by its entry in the table and its weight among the settings."""
    monkeypatch.setitem(TERMS, "kl", KL)
    held_out = {"eval_data": settings["data"], "eval_cache": settings["cache"], "eval_steps": 1}
    config = WithKL(**settings | held_out, lambda_align=0, lambda_vsd=0, lambda_kl=0.5, logit_chunk=chunk)
    assert config.terms == config.eval_terms == ("ce", "kl")
    assert config.distils
    assert not config.runs_teacher
    printed = Console(file=StringIO(), width=200)
    monkeypatch.setattr("cachekd_cli.console.console", printed)
    command.print_settings(config)
    assert "L_CE + 0.5 L_KL" in printed.file.getvalue()
    trainer = make_trainer(config, settings["out"].parent / "t")
    batch = collate_with_targets([trainer.train_dataset[index] for index in range(4)], 0)
    found = trainer.terms_of(trainer.model, batch)
    positions, targets = batch.student.positions, batch.targets
    logits = trainer.model(**batch.student.tensors).logits[positions][:, : targets.vocab_size]
    expected = forward_kl_loss(logits, targets, temperature=3.0, reduction="sum")
    torch.testing.assert_close(found.terms["kl"], expected)
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, (found.terms["ce"] + 0.5 * expected) / found.tokens)

    summary = train(config)
    assert summary.terms.keys() == {"ce", "kl"}
    assert summary.evaluation["eval_kl"] > 0
    weighted = summary.evaluation["eval_ce"] + 0.5 * summary.evaluation["eval_kl"]
    assert summary.evaluation["eval_loss"] == pytest.approx(weighted)
    log = json.loads((config.out / RUN_FILE).read_text())["log"]
    steps = [entry for entry in log if "loss" in entry]
    assert all(step["loss"] == pytest.approx(step["ce"] + 0.5 * step["kl"], rel=1e-4) for step in steps)
    assert steps[-1]["kl"] != steps[0]["kl"]
    run = read_run(config.out)
    (_, kl) = term_shares(run)["terms"]
    assert (kl["label"], kl["weight"]) == ("L_KL", 0.5)
    page = build_report(run, [])
    assert "L_KL" in page
    assert KL.about in page


def test_its_weight_is_what_turns_it_on(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(TERMS, "kl", KL)
    trainer = make_trainer(WithKL(**settings), tmp_path / "t")
    batch = collate_with_targets([trainer.train_dataset[0]], 0)
    assert trainer.terms_of(trainer.model, batch).terms.keys() == {"ce", "align", "vsd"}


def test_a_term_of_the_switched_path_reaches_the_vision_encoder_only(settings, tmp_path, monkeypatch):
    """And makes the run load a teacher, though L_VSD is off."""
    monkeypatch.setitem(TERMS, "kl", Term("L_KL", "", path="switched"))
    config = WithKL(**settings, lambda_align=0, lambda_vsd=0, lambda_kl=1)
    assert config.runs_teacher
    assert config.switches
    trainer = make_trainer(config, tmp_path / "t")
    batch = collate_with_targets([trainer.train_dataset[index] for index in range(3)], 0)
    trainer.terms_of(trainer.model, batch).terms["kl"].backward()
    touched = {name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert all(name.startswith("model.vision_tower.") for name in touched)


def test_a_switched_term_without_a_teacher_is_refused(settings, tmp_path):
    trainer = make_trainer(TrainConfig(**settings, lambda_vsd=0), tmp_path / "t")
    with pytest.raises(CachekdError, match="L_VSD needs a teacher to switch into"):
        LossTerms(trainer.model, {"vsd": 1.0})


# ---- batches


def test_a_batch_moves_whole_and_is_a_dictionary_to_the_trainer(settings, tmp_path):
    trainer = make_trainer(TrainConfig(**settings), tmp_path / "t")
    examples = [trainer.train_dataset[index] for index in range(2)]
    batch = collate_with_targets(examples, 0)
    there = batch.to("meta")
    moved = [*there.student.tensors.values(), there.student.supervised, there.targets.ids, there["labels"]]
    assert all(tensor.device.type == "meta" for tensor in moved)
    assert "labels" in batch
    assert "input_ids" in batch
    assert "keys" not in batch  # else the Trainer would take it for an input
    labels = batch["labels"]
    assert torch.equal(labels[labels != -100], torch.cat([x.encoded.token_ids for x in examples]))
    tokens = sum(len(x.encoded.token_ids) for x in examples)
    assert trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)[1] == tokens
    assert trainer.floating_point_ops(batch) > 0


def test_a_fault_that_stops_is_all_that_a_worker_hands_over(settings, tmp_path):
    trainer = make_trainer(TrainConfig(**settings), tmp_path / "t")
    fault = Fault("s", CachekdError("stale"), left_out=False)
    assert trainer.data_collator([trainer.train_dataset[0], fault]) is fault
    with pytest.raises(CachekdError, match="stale"):
        trainer.get_batch_samples(iter([fault]), 1, trainer.args.device)


# ---- the Trainer's private methods

# What transformers may change without notice. Each has its reason in its docstring.
PRIVATE = {
    "_clip_grad_norm": ["self", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_train_sampler": ["self", "train_dataset"],
    "_load_best_model": ["self"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_rng_state": ["self", "output_dir"],
}


def test_few_private_methods_of_the_trainer_are_overridden_as_they_are():
    ours = {
        name: method
        for name, method in vars(SwitchKDTrainer).items()
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }
    assert ours.keys() == PRIVATE.keys()
    for name, method in ours.items():
        for signature in (inspect.signature(method), inspect.signature(getattr(Trainer, name))):
            assert list(signature.parameters) == PRIVATE[name], name
        assert method.__doc__.startswith("Overridden"), name


class Calls:
    """Counts a method's calls that come from transformers' Trainer."""

    def __init__(self, monkeypatch) -> None:
        self.counts: Counter = Counter()
        for name in PRIVATE:
            monkeypatch.setattr(SwitchKDTrainer, name, self._counted(name, getattr(SwitchKDTrainer, name)))

    def _counted(self, name, method):
        def call(trainer, *args, **kwargs):
            if sys._getframe(1).f_code.co_filename == transformers_trainer.__file__:
                self.counts[name] += 1
            return method(trainer, *args, **kwargs)

        return call


def test_the_trainer_calls_each_of_them_in_a_run_that_is_cut_and_gone_on_with(settings, monkeypatch):
    """Three steps, the third of them in a second session; the student is the best one."""
    calls = Calls(monkeypatch)
    training = {"load_best_model_at_end": True}
    held_out = {"eval_data": settings["data"], "eval_cache": settings["cache"], "eval_steps": 1}
    config = TrainConfig(**settings | held_out, save_steps=1, training=training)
    asked = iter([0, 15])
    with pytest.raises(RunStopped):
        train(config, asked_to_stop=lambda: next(asked))
    first = dict(calls.counts)
    assert first["_save_checkpoint"] == first["_save_rng_state"] == 2
    assert first["_clip_grad_norm"] == first["_get_grad_norm"] == 2
    assert first["_get_train_sampler"] == 1
    assert "_load_from_checkpoint" not in first
    summary = train(config)
    assert summary.resumed_from == 2
    assert math.isfinite(summary.terms["ce"])
    more = Counter(calls.counts)
    more.subtract(first)
    assert more == dict.fromkeys(PRIVATE, 1)


def test_messages_name_the_terms_that_are_on(settings, monkeypatch):
    """Not L_VSD, whatever is switched."""
    monkeypatch.setitem(TERMS, "kl", Term("L_KL", "", path="switched"))
    on = settings | {"lambda_align": 0, "lambda_vsd": 0, "lambda_kl": 1}
    with pytest.raises(CachekdError, match="L_KL would have no gradient") as caught:
        WithKL(**on, trainable="projector")
    assert "lambda_kl 1" in str(caught.value)
    assert str(caught.value.fix).endswith("--lambda-kl 0")
    with pytest.raises(CachekdError, match="L_KL needs the teacher's cached logits") as caught:
        WithKL(**on | {"cache": None}).require_inputs()
    assert "--lambda-kl 0 for plain CE" in str(caught.value)
    with pytest.raises(CachekdError, match="language model for L_KL"):
        WithKL(**on | {"teacher": None}).require_inputs()
