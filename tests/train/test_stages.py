"""Which parts train, and which terms are on: stages, and what overrides them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from cachekd.config import TrainConfig, read_config
from cachekd.config.fields import PARTS
from cachekd.config.train import STAGES
from cachekd.errors import CachekdError
from cachekd.models import parameters_by_part, train_only
from cachekd.models.loading import keep_statistics
from cachekd.paths import RUN_FILE
from cachekd.train import train
from cachekd.train.open import make_trainer
from cachekd.train.student import memory_advice
from cachekd_cli.main import app
from tiny import tiny_processor, tiny_vlm

PREFIX = {
    "vision_encoder": "vision_tower",
    "projector": "multi_modal_projector",
    "language_model": "language_model",
}
TERMS = {"dpt": {"ce", "align"}, "sft": {"ce"}, "dft": {"ce", "align", "vsd"}}
TRAINED = {"dpt": {"projector"}, "sft": {"projector", "language_model"}, "dft": set(PARTS)}


@pytest.fixture
def settings(settings) -> dict:
    return settings | {"epochs": 1}


def changed_parts(before: Path, after: Path) -> tuple[set[str], set[str]]:
    """Parts of which some weight changed, and parts of which every weight is the same, bit by bit."""
    start, end = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert start.keys() == end.keys()
    same: dict[str, list[bool]] = {part: [] for part in PARTS}
    for name, weight in start.items():
        part = next((part for part, prefix in PREFIX.items() if prefix in name), "language_model")
        same[part].append(torch.equal(weight, end[name]))
    assert all(same.values())
    return {part for part in PARTS if not all(same[part])}, {part for part in PARTS if all(same[part])}


@pytest.mark.parametrize("stage", ["dpt", "sft", "dft"])
def test_a_stage_trains_exactly_its_parts_with_exactly_its_terms(settings, stage):
    config = TrainConfig(**settings, stage=stage)
    summary = train(config)
    assert set(summary.terms) == TERMS[stage]
    changed, same = changed_parts(Path(config.student), config.out)
    assert changed == TRAINED[stage]
    assert same == set(PARTS) - TRAINED[stage]
    stored = json.loads((config.out / RUN_FILE).read_text())["config"]
    assert stored["stage"] == stage
    assert set(stored["trainable"]) == TRAINED[stage]
    assert (stored["lambda_align"] > 0, stored["lambda_vsd"] > 0) == (
        "align" in TERMS[stage],
        "vsd" in TERMS[stage],
    )


@pytest.mark.parametrize("part", PARTS)
def test_the_optimizer_holds_the_trained_part_alone(settings, tmp_path, part):
    vsd = 1.0 if part == "vision_encoder" else 0.0
    config = TrainConfig(**settings, trainable=[part], lambda_vsd=vsd)
    trainer = make_trainer(config, tmp_path / "t")
    modes = {name: module.training for name, module in trainer.vlm.named_modules()}
    trainer.create_optimizer()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    parts = parameters_by_part(trainer.vlm)
    assert held == {id(parameter) for parameter in parts[part].values()}
    assert modes == {name: module.training for name, module in trainer.vlm.named_modules()}


def test_every_parameter_is_in_one_part():
    model = tiny_vlm(tiny_processor())
    parts = parameters_by_part(model)
    assert sorted(name for part in parts.values() for name in part) == sorted(
        name for name, _ in model.named_parameters()
    )
    for part, prefix in PREFIX.items():
        names = set(parts[part]) - {"lm_head.weight"}
        assert names
        assert all(f".{prefix}." in name for name in names)
    assert "lm_head.weight" in parts["language_model"]


def test_a_part_without_weights_is_nothing_to_train():
    model = tiny_vlm(tiny_processor())
    model.model.multi_modal_projector = torch.nn.Identity()
    with pytest.raises(CachekdError, match="nothing is left to train"):
        train_only(model, ("projector",))


def test_a_head_tied_to_the_embeddings_is_the_language_models():
    model = tiny_vlm(tiny_processor())
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    parts = parameters_by_part(model)
    assert "model.language_model.embed_tokens.weight" in parts["language_model"]
    train_only(model, ("projector",))
    assert not model.lm_head.weight.requires_grad


def test_what_is_said_outweighs_the_stage_and_the_stage_outweighs_defaults(settings, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    plain = {name: str(value) for name, value in settings.items()}
    recipe.write_text(yaml.safe_dump(plain | {"stage": "dpt", "lambda_align": 0.5}))
    config = read_config(recipe, TrainConfig, {})
    assert (config.trainable, config.lambda_align, config.lambda_vsd) == (("projector",), 0.5, 0.0)
    options = {"lambda_align": 0.25, "trainable": "projector,vision_encoder", "lambda_vsd": 2.0}
    config = read_config(recipe, TrainConfig, options)
    assert config.trainable == ("vision_encoder", "projector")  # as data flows
    assert (config.lambda_align, config.lambda_vsd) == (0.25, 2.0)
    config = read_config(recipe, TrainConfig, {"stage": "dft"})
    assert (config.trainable, config.lambda_align, config.lambda_vsd) == (PARTS, 0.5, 1.0)
    assert TrainConfig(**config.model_dump()) == config


def test_stages_say_what_they_leave_out():
    """A preset that kept L_VSD on without V_S could not even be made."""
    for preset in STAGES.values():
        assert set(preset) == {"trainable", "lambda_align", "lambda_vsd"}
        assert preset["lambda_vsd"] == 0 or "vision_encoder" in preset["trainable"]


def test_vsd_without_a_vision_encoder_to_train_is_refused_before_anything_is_read(tmp_path):
    nowhere = {name: str(tmp_path / name) for name in ("student", "teacher", "data", "cache", "out")}
    with pytest.raises(CachekdError, match="L_VSD would have no gradient") as caught:
        TrainConfig(**nowhere, trainable=["projector"])
    assert "--trainable vision_encoder,projector" in str(caught.value)
    assert "--lambda-vsd 0" in str(caught.value)
    with pytest.raises(CachekdError, match="no gradient"):
        read_config(None, TrainConfig, nowhere | {"stage": "sft", "lambda_vsd": 1.0})


@pytest.mark.parametrize("trainable", ["", "projector,projector", "head", []])
def test_parts_that_are_none_are_refused(tmp_path, trainable):
    values = {"student": "s", "data": "d", "out": tmp_path / "out", "trainable": trainable}
    with pytest.raises(CachekdError, match="trainable"):
        read_config(None, TrainConfig, values)


def test_checkpointing_with_a_frozen_language_model(settings):
    parts = {"trainable": "vision_encoder,projector", "gradient_checkpointing": True}
    train(TrainConfig(**settings, **parts))
    changed, _ = changed_parts(Path(settings["student"]), settings["out"])
    assert changed == {"vision_encoder", "projector"}


@pytest.mark.parametrize(
    ("changed", "knob"),
    [
        ({}, "--trainable vision_encoder,projector (no gradients and moments of the language model)"),
        ({"stage": "sft"}, "--trainable projector (gradients"),
        ({"stage": "dpt"}, None),  # fewer parts than one there are not
    ],
)
def test_out_of_memory_names_the_parts_that_could_be_frozen(settings, changed, knob):
    advice = memory_advice(TrainConfig(**settings, **changed))
    with pytest.raises(CachekdError, match="out of memory") as caught, advice:
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert knob in caught.value.fix if knob else "--trainable" not in caught.value.fix


def test_the_command_prints_what_counts(settings):
    command = ["train", "--stage", "dpt", "--lambda-align", "0.5", "--trainable", "projector"]
    for name in ("student", "data", "cache", "out"):
        command += [f"--{name}", str(settings[name])]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in shown.stdout.splitlines()]
    assert ["stage", "dpt"] in rows
    assert ["trainable", "projector"] in rows
    assert ["loss", "L_CE + 0.5 L_Align"] in rows


# ---- adapters

LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.mark.parametrize("exclude", [None, ["q_proj"], r".*\.q_proj"])
def test_adapters_stay_within_the_parts_that_train(settings, exclude):
    lora = LORA if exclude is None else LORA | {"exclude_modules": exclude}
    train(TrainConfig(**settings, trainable="language_model", lambda_vsd=0.0, lora=lora))
    changed, _ = changed_parts(Path(settings["student"]), settings["out"])
    assert changed == {"language_model"}
    names = load_file(settings["out"] / "adapter" / "adapter_model.safetensors")
    assert any("v_proj" in name for name in names)
    assert all("language_model" in name for name in names)
    assert any("q_proj" in name for name in names) == (exclude is None)


@pytest.mark.parametrize(
    ("lora", "parts", "message"),
    [
        ({"r": 4, "target_modules": ["linear_1"]}, "language_model", "peft refuses"),
        (LORA | {"modules_to_save": ["multi_modal_projector"]}, "language_model", "is to stay as it is"),
        ({"r": 4, "target_modules": ["linear_1"]}, "vision_encoder,projector", "which has no adapters"),
    ],
)
def test_adapters_that_do_not_fit_the_parts_are_refused(settings, lora, parts, message):
    vsd = 1.0 if "vision_encoder" in parts else 0.0
    with pytest.raises(CachekdError, match=message):
        train(TrainConfig(**settings, trainable=parts, lambda_vsd=vsd, lora=lora))
    assert not settings["out"].exists()


# ---- the Trainer's own reports


def test_tensorboard_gets_every_term(settings, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(logs))
    train(TrainConfig(**settings, training={"report_to": ["tensorboard"]}))
    events = EventAccumulator(str(logs)).Reload()
    log = [e for e in json.loads((settings["out"] / RUN_FILE).read_text())["log"] if "ce" in e]
    assert len(log) == 3
    for name in ("ce", "align", "vsd", "loss"):
        written = [event.value for event in events.Scalars(f"train/{name}")]
        assert written == pytest.approx([entry[name] for entry in log], rel=1e-6)


def test_batch_norms_use_and_keep_the_checkpoints_statistics_in_training():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    before, pixels = model[1].running_mean.clone(), torch.rand(2, 3, 5, 5)
    expected = model(pixels)
    keep_statistics(model)
    assert torch.equal(model.train()(pixels), expected)
    assert torch.equal(model[1].running_mean, before)
