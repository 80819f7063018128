"""Held-out data while a student trains: the right numbers, training as it was, the best student saved."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.config import TrainConfig, read_config
from cachekd.data import SampleEncoder, collate, open_samples, predicting_positions
from cachekd.errors import CachekdError
from cachekd.losses import dbild_loss
from cachekd.losses.targets import DenseTargets
from cachekd.models import load_model, load_processor, logits_at
from cachekd.paths import RUN_FILE
from cachekd.train import SwitchKDTrainingArguments, train
from cachekd.train.estimate import estimate_training
from cachekd.train.folder import CHECKPOINTS
from cachekd.train.open import make_trainer
from cachekd_cli.main import app
from caches import copied, dump_cache
from launch import train_in_two_processes
from runs import CutShort
from tiny import save_vlm, tar_members, tiny_processor, write_tar

CPU = torch.device("cpu")
NAMES = ("loss", "ce", "align", "vsd", "token_accuracy")
CE_ALONE = {"lambda_align": 0.0, "lambda_vsd": 0.0, "cache": None, "eval_cache": None, "teacher": None}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Seven samples that nobody trains on; the last batches are not full."""
    folder = tmp_path_factory.mktemp("held-out")
    write_tar(folder / "0.tar", tar_members(7, start=40))
    return folder


@pytest.fixture(scope="module")
def eval_cache(tmp_path_factory, teacher_path, held_out) -> Path:
    return dump_cache(tmp_path_factory.mktemp("caches") / "held-out", teacher_path, held_out)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory, student_path) -> Path:
    """A student with dropout, whose numbers tell train from eval mode, and one random state from another."""
    folder = copied(student_path, tmp_path_factory.mktemp("models") / "dropping")
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["attention_dropout"] = 0.3
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def settings(tmp_path, dropping, teacher_path, data_path, cache_path, held_out, eval_cache) -> dict:
    return {
        "student": str(dropping),
        "teacher": str(teacher_path),
        "data": str(data_path),
        "cache": str(cache_path),
        "eval_data": str(held_out),
        "eval_cache": str(eval_cache),
        "eval_steps": 2,
        "out": tmp_path / "run",
        "batch_size": 4,
        "epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }


def recorded(out: Path) -> dict:
    return json.loads((out / RUN_FILE).read_text())


def evaluations(log: list[dict]) -> dict[int, dict[str, float]]:
    return {
        entry["step"]: {name: entry[f"eval_{name}"] for name in NAMES if f"eval_{name}" in entry}
        for entry in log
        if "eval_loss" in entry
    }


def trained(log: list[dict]) -> list[dict[str, float]]:
    """What was logged of the steps themselves."""
    names = ("step", "loss", "ce", "align", "vsd", "grad_norm", "learning_rate")
    return [{name: entry[name] for name in names if name in entry} for entry in log if "ce" in entry]


def reference(student_path: Path, config: TrainConfig, *, keys: set[str] | None = None) -> dict[str, float]:
    """The same from whole models, sample by sample, with all logits at once.

    Args:
        keys: of the samples that count; by default all.
    """
    student = load_model(str(student_path), dtype=torch.float32, device=CPU)
    teacher = load_model(config.teacher, dtype=torch.float32, device=CPU)
    switched = load_model(config.teacher, dtype=torch.float32, device=CPU)
    switched.model.vision_tower = student.model.vision_tower
    encoder = SampleEncoder(load_processor(config.student))
    width = len(encoder.processor.tokenizer)
    cache = None if config.live_teacher else LogitCache(config.eval_cache)
    found = dict.fromkeys(NAMES, 0.0)
    tokens = distilled = 0
    samples = open_samples(config.eval_data)
    for index, key in enumerate(samples.keys):
        if keys is not None and key not in keys:
            continue
        sample = samples[index]
        batch = collate([encoder(sample)], 0)
        supervised = batch.pop("supervised")
        answers, positions = batch["input_ids"][supervised], predicting_positions(supervised)
        with torch.no_grad():
            own, z_w, z_t = (logits_at(model, batch, positions) for model in (student, switched, teacher))
        found["ce"] -= float(own.log_softmax(-1)[torch.arange(len(answers)), answers].sum())
        found["token_accuracy"] += int((own.argmax(-1) == answers).sum())
        tokens += len(answers)
        if cache is None or sample.key in cache:
            targets = DenseTargets(z_t[:, :width], answers) if cache is None else cache[sample.key]
            kneedle = {"window": 128, "min_k": 2, "temperature": config.temperature}
            for name, logits in (("align", own), ("vsd", z_w)):
                found[name] += float(dbild_loss(logits[:, :width], targets, **kneedle, reduction="sum"))
            distilled += len(answers)
    for name in NAMES[1:]:
        found[name] /= distilled if name in ("align", "vsd") else tokens
    found["loss"] = found["ce"] + config.lambda_align * found["align"] + config.lambda_vsd * found["vsd"]
    return found


# ---- the numbers


@pytest.mark.parametrize("changed", [{}, {"logit_chunk": 2, "training": {"per_device_eval_batch_size": 3}}])
def test_the_numbers_are_those_of_the_student_that_was_saved(settings, changed):
    """At step 6 the switched path does not run in training."""
    changed |= {"lambda_align": 0.7, "lambda_vsd": 0.3, "vsd_every": 4, "eval_steps": 4}
    config = TrainConfig(**settings | changed)
    summary = train(config)
    found = evaluations(recorded(config.out)["log"])
    assert list(found) == [4, 6]  # the last step has one anyway
    assert found[6] == pytest.approx(reference(config.out, config), rel=1e-4)
    assert found[4] != found[6]
    assert summary.evaluation["eval_loss"] == found[6]["loss"]
    assert recorded(config.out)["evaluation"] == summary.evaluation
    assert summary.best_step is None


def test_only_a_part_of_the_data_is_evaluated(settings, eval_cache):
    """With its own limit and seed, read as the run's own data are."""
    data = {"data": settings["eval_data"], "limit": 3, "shuffle_seed": 1}
    config = TrainConfig(**settings | {"eval_data": data, "epochs": 1})
    train(config)
    found = evaluations(recorded(config.out)["log"])[3]
    assert found == pytest.approx(reference(config.out, config), rel=1e-4)
    everything = reference(config.out, TrainConfig(**settings))
    assert found["ce"] != pytest.approx(everything["ce"], rel=1e-3)


def test_a_live_teacher_is_asked_on_held_out_data_too(settings, tmp_path):
    """In a step in which the switched path does not train."""
    live = {"live_teacher": True, "cache": None, "eval_cache": None, "vsd_every": 2}
    config = TrainConfig(**settings | live)
    trainer = make_trainer(config, tmp_path / "t")
    trainer.state.global_step = 1
    found = trainer.evaluate()
    expected = reference(Path(config.student), config)
    assert {name: found[f"eval_{name}"] for name in NAMES} == pytest.approx(expected, rel=1e-4)


def test_without_a_cache_of_their_own_what_is_not_computed_is_said_once(settings, caplog):
    config = TrainConfig(**settings | {"eval_cache": None})
    with caplog.at_level(logging.WARNING):
        train(config)
    said = [record.message for record in caplog.records if "held-out data" in record.message]
    (line,) = said
    assert "L_Align and L_VSD are not computed, and not in eval_loss" in line
    assert "set eval_cache" in line
    for found in evaluations(recorded(config.out)["log"]).values():
        assert set(found) == {"loss", "ce", "token_accuracy"}
        assert found["loss"] == found["ce"]
    expected = reference(config.out, TrainConfig(**settings))
    assert found["token_accuracy"] == pytest.approx(expected["token_accuracy"])
    assert found["ce"] == pytest.approx(expected["ce"], rel=1e-5)


def held_out_text(tmp_path: Path, teacher_path: Path) -> dict[str, str]:
    turns = [{"from": "human", "value": "is there a dog?"}, {"from": "gpt", "value": "no"}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": "t", "conversations": turns}]))
    cache = dump_cache(tmp_path / "text", teacher_path, tmp_path / "text.json", tail="none")
    return {"eval_data": str(tmp_path / "text.json"), "eval_cache": str(cache)}


def test_text_alone_has_nothing_to_switch(settings, tmp_path, teacher_path, caplog):
    texts = held_out_text(tmp_path, teacher_path) | {"epochs": 1}
    with caplog.at_level(logging.WARNING):
        summary = train(TrainConfig(**settings | texts))
    assert {f"eval_{name}" for name in NAMES} - summary.evaluation.keys() == {"eval_vsd"}
    assert "L_VSD is not computed, and not in eval_loss: none of them has a picture" in caplog.text


def test_what_is_right_is_counted_beside_the_terms(settings, tmp_path):
    """Whatever is in `terms` has a weight in the loss."""
    trainer = make_trainer(TrainConfig(**settings), tmp_path / "t")
    batch = next(trainer.validation.batches(trainer.args))
    evaluated = trainer.terms_of(trainer.model, batch, evaluating=True)
    trained = trainer.terms_of(trainer.model, batch)
    assert evaluated.terms.keys() == trained.terms.keys() == trainer.terms.weights.keys()
    assert 0 <= int(evaluated.right) <= evaluated.tokens == trained.tokens
    assert trained.right is None


def test_plain_cross_entropy_says_nothing_of_terms_that_are_off(settings, caplog):
    with caplog.at_level(logging.WARNING):
        summary = train(TrainConfig(**settings | CE_ALONE))
    assert summary.evaluation.keys() == {"eval_loss", "eval_ce", "eval_token_accuracy", "eval_runtime"}
    assert "not computed" not in caplog.text


# ---- training is left as it was


@pytest.mark.parametrize("changed", [{}, {"gradient_accumulation": 2, "batch_size": 2}, {"workers": 1}])
def test_training_is_bit_by_bit_what_it_is_without(settings, tmp_path, changed):
    settings |= changed
    for name, more in (
        ("with", {}),
        ("without", {"eval_data": None, "eval_cache": None, "eval_steps": None}),
    ):
        train(TrainConfig(**settings | more | {"out": tmp_path / name}))
    logs = [trained(recorded(tmp_path / name)["log"]) for name in ("with", "without")]
    assert logs[0] == logs[1]
    students = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert students[0] == students[1]
    assert len(evaluations(recorded(tmp_path / "with")["log"])) == 3


def test_a_resumed_run_evaluates_as_one_that_was_never_stopped(settings, tmp_path):
    settings |= {"save_steps": 2, "training": {"eval_on_start": True}}
    whole = TrainConfig(**settings | {"out": tmp_path / "whole"})
    train(whole)
    for cut in (3, 5):
        config = TrainConfig(**settings | {"out": tmp_path / str(cut)})
        with pytest.raises(KeyboardInterrupt):
            train(config, [CutShort(cut)])
        train(config)
        runs = [recorded(out) for out in (whole.out, config.out)]
        assert runs[1]["resumed_from"] == cut - 1
        assert evaluations(runs[0]["log"]) == evaluations(runs[1]["log"])
        assert list(evaluations(runs[1]["log"])) == [0, 2, 4, 6]
        assert trained(runs[0]["log"]) == trained(runs[1]["log"])
        weights = [(out / "model.safetensors").read_bytes() for out in (whole.out, config.out)]
        assert weights[0] == weights[1], cut


def test_time_to_evaluate_is_no_waiting_for_data(settings, tmp_path, monkeypatch):
    trainer = make_trainer(TrainConfig(**settings), tmp_path / "t")
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr("cachekd.train.callbacks.time.perf_counter", lambda: next(times))
    batches = trainer.data_wait.timed(iter([1, 2]))
    next(batches)  # asked at 0, there at 10, where the clock starts
    with trainer.data_wait.paused():  # 20 to 30
        pass
    assert trainer.data_wait.total.elapsed == 40 - 10 - 10


# ---- the best student


def best_of(found: dict[int, dict[str, float]], name: str = "loss") -> int:
    return min(found, key=lambda step: found[step][name])


# The head, without which the last norm bounds how much worse it can become.
HEAD_LORA = {"lora": {"r": 4, "target_modules": ["lm_head", "q_proj"]}, "learning_rate": 3.0}


@pytest.mark.parametrize("changed", [{}, HEAD_LORA, {"eval_steps": 1, "save_steps": 12}])
def test_the_best_student_is_what_is_saved(settings, changed):
    """At a learning rate that soon makes it worse."""
    training = {"load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    changed = {"save_steps": 2, "learning_rate": 0.03, "warmup": 0.0, "epochs": 4} | changed
    config = TrainConfig(**settings | changed, training=training, keep_checkpoints=True)
    summary = train(config)
    found = evaluations(recorded(config.out)["log"])
    best = best_of(found)
    assert best < summary.steps == 12
    assert (summary.best_step, recorded(config.out)["best_step"]) == (best, best)
    expected = reference(config.out, config)  # with adapters: merged
    assert found[best] == pytest.approx(expected, rel=1e-3)
    assert summary.evaluation["eval_loss"] == found[best]["loss"]
    name = "adapter_model.safetensors" if config.lora else "model.safetensors"
    saved = load_file((config.out / "adapter" if config.lora else config.out) / name)
    kept = load_file(config.out / CHECKPOINTS / f"checkpoint-{best}" / name)
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[key], kept[key]) for key in kept)


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def test_the_best_student_survives_a_run_that_is_cut_short_and_moved(settings, tmp_path, monkeypatch):
    """In the middle, and when it only has to be finished."""
    training = {"load_best_model_at_end": True, "lr_scheduler_type": "constant", "save_total_limit": 2}
    settings |= {"save_steps": 2, "learning_rate": 0.03, "warmup": 0.0, "epochs": 4, "training": training}
    whole = TrainConfig(**settings | {"out": tmp_path / "whole"})
    summary = train(whole)
    for cut in (10, 12):
        with monkeypatch.context() as patch:
            patch.setattr("cachekd.train.run.save_run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(TrainConfig(**settings), [CutShort(cut + 1)])
        moved = shutil.move(settings["out"], tmp_path / f"moved-{cut}")
        config = TrainConfig(**settings | {"out": moved})
        resumed = train(config)
        assert resumed.resumed_from == cut
        assert resumed.best_step == summary.best_step < 10
        assert resumed.evaluation["eval_loss"] == summary.evaluation["eval_loss"]
        weights = [(out / "model.safetensors").read_bytes() for out in (whole.out, config.out)]
        assert weights[0] == weights[1], cut
        assert not (config.out / CHECKPOINTS).exists()


def test_a_best_student_that_is_gone_is_not_replaced_in_silence(settings):
    training = {"load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    changed = {"save_steps": 2, "learning_rate": 0.03, "warmup": 0.0, "epochs": 4, "training": training}
    config = TrainConfig(**settings | changed)
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(11)])
    (state,) = (config.out / CHECKPOINTS).glob("checkpoint-10/trainer_state.json")
    best = json.loads(state.read_text())["best_global_step"]
    assert best < 10
    shutil.rmtree(config.out / CHECKPOINTS / f"checkpoint-{best}")
    with pytest.raises(CachekdError, match="best student's checkpoint is gone"):
        train(config)


def test_the_student_that_training_began_with_is_not_the_best(settings):
    """It has no checkpoint. (Here the largest loss is the best, and it would be.)"""
    training = {"load_best_model_at_end": True, "eval_on_start": True, "greater_is_better": True}
    config = TrainConfig(**settings | {"save_steps": 2}, training=training)
    summary = train(config)
    found = evaluations(recorded(config.out)["log"])
    assert max(found, key=lambda step: found[step]["loss"]) == 0
    assert summary.best_step == 2
    assert found[2] == pytest.approx(reference(config.out, config), rel=1e-3)


def test_evaluations_that_are_not_finite_are_said_and_none_is_the_best(settings, caplog):
    """After one step that is far too large."""
    training = {
        "load_best_model_at_end": True,
        "max_steps": 1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    changed = {"learning_rate": 1e38, "max_grad_norm": 0.0, "warmup": 0.0, "eval_steps": 1, "save_steps": 1}
    with caplog.at_level(logging.WARNING):
        summary = train(TrainConfig(**settings | changed, training=training))
    assert not math.isfinite(summary.evaluation["eval_loss"])
    assert summary.best_step is None
    assert "step 1: eval_loss is not finite: ce " in caplog.text
    assert "no evaluation has a finite eval_loss: the student is that of the last step" in caplog.text


def test_by_the_share_of_right_tokens_more_is_better(settings, tmp_path):
    def better(metric: str) -> bool | None:
        training = {"load_best_model_at_end": True, "metric_for_best_model": metric}
        config = TrainConfig(**settings | {"save_steps": 2}, training=training)
        return SwitchKDTrainingArguments.of(config, tmp_path).greater_is_better

    assert [better(f"eval_{name}") for name in NAMES] == [False] * 4 + [True]
    assert better("vsd") is False


# ---- settings


@pytest.mark.parametrize(
    ("training", "changed", "says"),
    [
        ({"eval_strategy": "steps"}, {"eval_data": None}, "--eval-data PATH"),
        ({"load_best_model_at_end": True}, {"eval_data": None}, "--eval-data PATH"),
        ({"eval_on_start": True}, {"eval_data": None}, "--eval-data PATH"),
        ({"eval_strategy": "no"}, {}, "as there are held-out data"),
        ({"eval_strategy": "epoch"}, {}, "steps, or no eval_steps"),
        ({"eval_steps": 3}, {}, "set `eval_steps` at the top level"),
        ({"do_eval": True}, {}, "set `eval_data` at the top level"),
        ({"eval_delay": 99}, {}, "after the first `eval_steps` steps"),
        ({"bf16_full_eval": True}, {}, "in the dtype that it trains in"),
        ({"metric_for_best_model": "accuracy"}, {}, "eval_token_accuracy"),
        ({"metric_for_best_model": "eval_vsd"}, {"eval_cache": None}, "--eval-cache"),
        ({"load_best_model_at_end": True}, {"save_steps": 0}, "save_steps above 0"),
        ({"load_best_model_at_end": True}, {"save_steps": 3}, "multiple of the evaluation steps"),
        ({"load_best_model_at_end": True, "save_total_limit": 1}, {"save_steps": 2}, "at least 2"),
        ({"load_best_model_at_end": True, "save_strategy": "epoch"}, {}, "strategy to match"),
        ({"save_strategy": "best"}, {}, "load_best_model_at_end: true keeps"),
    ],
)
def test_settings_that_would_be_ignored_or_fail_late_are_refused(settings, tmp_path, training, changed, says):
    with pytest.raises(CachekdError) as caught:
        SwitchKDTrainingArguments.of(TrainConfig(**settings | changed, training=training), tmp_path)
    assert says in str(caught.value)
    assert "training" in str(caught.value.where)


def test_evaluations_at_the_end_of_epochs(settings):
    training = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    config = TrainConfig(**settings | {"eval_steps": None}, training=training)
    summary = train(config)
    found = evaluations(recorded(config.out)["log"])
    assert list(found) == [3, 6]
    assert summary.best_step == best_of(found)


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"eval_data": None, "eval_steps": None}, "eval_cache"),
        ({"eval_data": None, "eval_cache": None}, "eval_steps"),
        ({"live_teacher": True, "cache": None}, "eval_cache"),
    ],
)
def test_settings_of_no_held_out_data_are_refused(settings, changed, names):
    with pytest.raises(CachekdError) as caught:
        train(TrainConfig(**settings | changed))
    assert names in str(caught.value.where)
    assert not settings["out"].exists()


def test_a_mistyped_option_of_held_out_data_is_named(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("student: s\ndata: d\nout: o\neval_data: {data: v, limt: 3}\n")
    with pytest.raises(CachekdError) as caught:
        read_config(recipe, TrainConfig, {})
    assert caught.value.problem == "unknown setting 'eval_data.limt' (did you mean 'limit'?)"
    assert caught.value.where == f"{recipe}, line 4"
    assert "shuffle_seed" in caught.value.expected
    assert caught.value.found == "3"


def test_what_decides_the_best_student_is_recorded():
    """`save_steps` may change between two sessions of a run, and says when students are compared."""
    run = {"student": "s", "data": "d", "out": "o"}

    def recorded_steps(**said) -> int | None:
        return TrainConfig(**run | said).deciding()["eval_steps"]

    assert [recorded_steps(eval_data="v", save_steps=steps) for steps in (2, 5, 0)] == [2, 5, 500]
    assert recorded_steps(eval_data="v", save_steps=2, eval_steps=7) == 7
    assert recorded_steps(save_steps=2) is None
    assert recorded_steps(eval_data="v", training={"eval_strategy": "epoch"}) is None
    with pytest.raises(ValidationError) as caught:
        TrainConfig(**run, eval_data="v", save_steps=-1)
    assert [error["loc"] for error in caught.value.errors()] == [("save_steps",)]


def test_what_is_said_of_the_data_holds_for_the_held_out_ones():
    said = {
        "key": "uid",
        "on_error": "skip",
        "limit": 3,
        "shuffle_seed": 1,
        "max_tokens": 99,
        "image_root": "i",
    }
    run = {"student": "s", "data": "d", "out": "o", "cache": "c", "binding": "b", "stage": "dft"}
    named = TrainConfig(**run | said, eval_data="v").on_held_out()
    assert (named.data, named.key, named.on_error, named.max_tokens) == ("v", "uid", "skip", 99)
    assert (named.limit, named.shuffle_seed, named.image_root) == (None, None, None)
    assert (named.cache, named.binding, named.stage) == (None, None, "dft")
    assert "too_long" not in named.model_fields_set  # said by nobody: the cache may say it
    own = {"data": "v", "key": "id", "limit": 5}
    config = TrainConfig(**run | said, eval_data=own, eval_cache="e")
    other = config.on_held_out()
    assert (other.key, other.limit, other.on_error, other.cache) == ("id", 5, "skip", "e")
    assert config.model_dump(mode="json")["eval_data"] == own  # a run's folder has what was said
    assert TrainConfig(**config.model_dump(mode="json")) == config


# ---- refused before any weights are loaded


@pytest.fixture
def no_weights(monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("cachekd.train.open.load_student", fail)
    monkeypatch.setattr("cachekd.train.open.load_teacher", fail)


def refused(settings: dict) -> str:
    with pytest.raises(CachekdError) as caught:
        train(TrainConfig(**settings))
    assert not Path(settings["out"]).exists()
    return str(caught.value)


@pytest.mark.usefixtures("no_weights")
def test_the_best_student_by_a_term_that_the_held_out_data_do_not_have(settings, tmp_path, teacher_path):
    training = {"load_best_model_at_end": True, "metric_for_best_model": "eval_vsd"}
    texts = held_out_text(tmp_path, teacher_path) | {"save_steps": 2, "training": training}
    told = refused(settings | texts)
    assert "setting 'training.metric_for_best_model'" in told
    assert "one of eval_loss, eval_ce, eval_align, eval_token_accuracy" in told
    assert "none of these has one" in told


@pytest.mark.usefixtures("no_weights")
def test_held_out_data_that_cannot_be_used_are_refused_before_weights_are_loaded(
    settings, tmp_path, teacher_path, held_out
):
    told = refused(settings | {"eval_data": str(tmp_path / "nowhere")})
    assert "setting 'eval_data'" in told
    assert str(tmp_path / "nowhere") in told
    told = refused(settings | {"eval_cache": str(tmp_path / "nowhere")})
    assert "setting 'eval_cache'" in told

    write_tar(tmp_path / "more" / "0.tar", tar_members(9, start=40))
    told = refused(settings | {"eval_data": str(tmp_path / "more")})
    assert "setting 'eval_cache'" in told
    assert "2 are missing, the first is 's047'" in told
    assert "leave eval_cache out" in told

    members = tar_members(7, start=40)
    members[7] = (members[7][0], members[7][1].replace(b"yes", b"maybe").replace(b"red", b"blue"))
    write_tar(tmp_path / "changed" / "0.tar", members)
    told = refused(settings | {"eval_data": str(tmp_path / "changed")})
    assert "setting 'eval_data': sample 's043'" in told

    other = save_vlm(tmp_path / "teacher", tiny_processor(), text_width=48, vision_layers=3, seed=7)
    cache = dump_cache(tmp_path / "of-another", other, held_out)
    told = refused(settings | {"eval_cache": str(cache)})
    assert "a different teacher's weights" in told
    assert "setting 'eval_cache'" in told
    template = tiny_processor().chat_template + "{# another #}"
    other = save_vlm(tmp_path / "template", tiny_processor(template=template), text_width=48, seed=1)
    cache = dump_cache(tmp_path / "of-a-template", other, held_out)
    assert "setting 'eval_cache'" in refused(settings | {"eval_cache": str(cache), "lambda_align": 1.0})


def test_held_out_samples_that_the_cache_lacks_or_that_are_bad(settings, tmp_path, eval_cache):
    members = tar_members(9, start=40)
    members[2] = (members[2][0], b"not a png")  # s041
    write_tar(tmp_path / "more" / "0.tar", members)
    settings |= {"eval_data": str(tmp_path / "more"), "epochs": 1}
    with pytest.raises(CachekdError, match="s041"):
        train(TrainConfig(**settings | {"missing": "skip"}))
    good = {f"s{number:03d}" for number in range(40, 49)} - {"s041"}
    for missing, keys in (("skip", good - {"s047", "s048"}), ("ce-only", good)):
        config = TrainConfig(**settings | {"missing": missing, "on_error": "skip", "out": tmp_path / missing})
        summary = train(config)
        found = evaluations(recorded(config.out)["log"])[3]
        assert found == pytest.approx(reference(config.out, config, keys=keys), rel=1e-4)
        assert list(summary.eval_bad.first) == ["s041"]
        assert list(summary.eval_missing.first) == (["s047", "s048"] if missing == "skip" else [])
        assert recorded(config.out)["eval_left_out"]["bad"]["samples"] == 1
        assert summary.bad.samples == 0


# ---- gone on with


def test_other_held_out_data_at_the_same_path_are_refused(settings, tmp_path, eval_cache):
    data, cache = tmp_path / "data", copied(eval_cache, tmp_path / "cache")
    write_tar(data / "0.tar", tar_members(7, start=40))
    settings |= {"eval_data": {"data": str(data), "limit": 7}, "eval_cache": str(cache), "save_steps": 2}
    config = TrainConfig(**settings)
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(3)])
    write_tar(data / "0.tar", tar_members(6, start=40))
    with pytest.raises(CachekdError, match="begun with another eval_data at") as caught:
        train(config)
    assert str(data) in str(caught.value)
    write_tar(data / "0.tar", tar_members(7, start=40))
    shutil.rmtree(cache)
    dump_cache(cache, Path(settings["teacher"]), data, tail="none")
    with pytest.raises(CachekdError, match="begun with another eval_cache at"):
        train(config)
    with pytest.raises(CachekdError, match="other settings"):
        train(TrainConfig(**settings | {"eval_steps": 3}))


# ---- the last step is always logged


def test_the_last_step_is_logged_once(settings, tmp_path):
    settings |= {"save_steps": 2}
    each = TrainConfig(**settings | {"out": tmp_path / "each"})
    train(each)
    of_each = {entry["step"]: entry for entry in trained(recorded(each.out)["log"])}
    for every, steps in ((10, [1, 6]), (4, [1, 4, 6]), (3, [1, 3, 6])):
        config = TrainConfig(**settings | {"logging_steps": every, "out": tmp_path / str(every)})
        summary = train(config)
        log = trained(recorded(config.out)["log"])
        assert [entry["step"] for entry in log] == steps
        since = range(steps[-2] + 1, 7)
        mean = sum(of_each[step]["loss"] for step in since) / len(since)
        assert log[-1]["loss"] == pytest.approx(mean, rel=1e-6), every
        assert summary.terms == {name: log[-1][name] for name in ("ce", "align", "vsd")}


def test_the_last_step_of_a_resumed_run_is_logged(settings):
    config = TrainConfig(**settings | {"save_steps": 2, "logging_steps": 10})
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(3)])
    train(config)
    assert [entry["step"] for entry in trained(recorded(config.out)["log"])] == [1, 6]


def test_a_run_that_only_has_to_be_finished_knows_its_last_terms(settings, monkeypatch):
    config = TrainConfig(**settings | {"save_steps": 2})
    monkeypatch.setattr("cachekd.train.run.save_processor", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(CachekdError, match="could not be finished"):
        train(config)
    monkeypatch.undo()
    summary = train(config)
    assert summary.resumed_from == summary.steps == 6
    assert set(summary.terms) == {"ce", "align", "vsd"}
    assert summary.evaluation["eval_loss"] == evaluations(recorded(config.out)["log"])[6]["loss"]


# ---- shown, reported, estimated


def test_the_command_shows_every_evaluation(settings, tmp_path):
    command = ["train", "--student", settings["student"], "--data", settings["data"]]
    command += ["--eval-data", settings["eval_data"], "--eval-steps", "1", "--out", str(tmp_path / "o")]
    command += ["--lambda-align", "0", "--lambda-vsd", "0", "--batch-size", "6"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    for step, found in evaluations(recorded(tmp_path / "o")["log"]).items():
        line = f"step {step}: eval_loss {found['loss']:.4f}"
        assert line in " ".join(done.output.split())
    assert settings["eval_data"] in done.output.replace("\n", "")
    assert f"{found['token_accuracy']:.4f}" in done.output


def test_tensorboard_gets_every_evaluation(settings, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train(TrainConfig(**settings, training={"report_to": ["tensorboard"]}))
    events = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    found = evaluations(recorded(settings["out"])["log"])
    for name in NAMES:
        written = {event.step: event.value for event in events.Scalars(f"eval/{name}")}
        assert written == pytest.approx({step: row[name] for step, row in found.items()}, rel=1e-6)


def test_an_estimate_counts_evaluations_and_leaves_them_out(settings):
    training = {"load_best_model_at_end": True, "eval_on_start": True}
    config = TrainConfig(**settings | {"save_steps": 2, "epochs": 5}, training=training)
    found = estimate_training(config)
    assert (found.steps, found.evaluations) == (15, 9)  # before the first, at 2, 4, ..., 14, and at 15
    assert 0 < found.seconds_per_evaluation < 60
    plain = estimate_training(
        TrainConfig(**settings | {"eval_data": None, "eval_cache": None, "eval_steps": None})
    )
    assert (plain.evaluations, plain.seconds_per_evaluation) == (0, 0.0)


# ---- in two processes


@pytest.mark.slow
def test_two_processes_evaluate_as_one(settings, tmp_path, student_path):
    """Three batches of seven samples, one of which is bad: the second process has one batch, and nothing in
    its second. What each counts is summed, nothing twice; and both load the best student."""
    members = tar_members(7, start=40)
    members[8] = (members[8][0], b"not a png")  # s044
    write_tar(tmp_path / "bad" / "0.tar", members)
    training = {"load_best_model_at_end": True, "optim": "sgd", "per_device_eval_batch_size": 3}
    # Without dropout, which every process draws for itself.
    settings |= {"student": str(student_path), "epochs": 3, "save_steps": 2, "training": training}
    settings |= {"eval_data": {"data": str(tmp_path / "bad"), "on_error": "skip"}, "vsd_every": 3}
    train(TrainConfig(**settings | {"batch_size": 6, "out": tmp_path / "one"}))
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps(settings | {"batch_size": 3, "workers": 1, "out": str(tmp_path / "two")}))
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("step 6: eval_loss") == 1  # the first process prints
    runs = [recorded(tmp_path / name) for name in ("one", "two")]
    one, two = (evaluations(run["log"]) for run in runs)
    assert list(one) == list(two) == [2, 4, 6]
    for step, found in one.items():
        assert two[step] == pytest.approx(found, rel=1e-4), step
    assert runs[0]["best_step"] == runs[1]["best_step"]
    assert [run["eval_left_out"]["bad"]["first"].keys() for run in runs] == [{"s044"}, {"s044"}]
