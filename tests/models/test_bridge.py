"""The switch bridge, beyond the paper: a trained map between V_S and P_T where their shapes differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling
from typer.testing import CliRunner

from cachekd.config import DumpConfig, TrainConfig
from cachekd.data import SampleEncoder, collate, open_samples, predicting_positions
from cachekd.dump import dump
from cachekd.errors import CachekdError
from cachekd.losses import dbild_loss
from cachekd.models import (
    SwitchBridge,
    SwitchedTeacher,
    capture_vision,
    encode,
    load_config,
    load_model,
    load_processor,
    plan_bridge,
    project,
)
from cachekd.models.bridge import BridgePlan, resampled
from cachekd.models.weights import weights_files
from cachekd.paths import BRIDGE_FILE, RUN_FILE
from cachekd.train import train
from cachekd.train.batch import collate_with_targets
from cachekd.train.estimate import estimate_training
from cachekd.train.open import make_trainer
from cachekd_cli.main import app
from launch import train_in_two_processes
from runs import CutShort
from tiny import checked, save_vlm, tiny_processor, tiny_vlm, write_llava_json
from tiny_families import FAMILIES, _wake

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict:
    """A run's settings: a teacher of 4 x 4 patches of width 32, a student of 2 x 2 of width 48, a cache."""
    folder = tmp_path_factory.mktemp("bridge")
    teacher = save_vlm(folder / "teacher", tiny_processor(), text_width=48, vision_layers=3, seed=1)
    student = tiny_processor(patch_size=16)
    student = save_vlm(folder / "student", student, vision_width=48, patch_size=16, seed=2)
    data = write_llava_json(folder / "data", 12)
    dump(DumpConfig(teacher=str(teacher), data=str(data), out=folder / "cache", batch_size=4))
    return {
        "teacher": str(teacher),
        "student": str(student),
        "data": str(data),
        "cache": folder / "cache",
        "switch_bridge": "linear",
        "batch_size": 4,
        "epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }


# ---- the module


def test_patches_are_resampled_as_a_picture_is():
    """Against Pillow, which resizes float pictures by a triangle filter."""
    patches = torch.randn(2, 36, 3)
    for other in (3, 4, 6, 9):
        found = resampled(patches, 6, other)
        assert found.shape == (2, other * other, 3)
        for image in range(2):
            for channel in range(3):
                picture = Image.fromarray(patches[image, :, channel].reshape(6, 6).numpy())
                expected = np.asarray(picture.resize((other, other), Image.Resampling.BILINEAR))
                np.testing.assert_allclose(
                    found[image, :, channel].reshape(other, other).numpy(), expected, atol=1e-5
                )


def test_only_what_the_projector_reads_is_bridged_and_class_tokens_are_kept_apart():
    states = tuple(torch.randn(2, 1 + 4, 6) for _ in range(3))
    output = BaseModelOutputWithPooling(last_hidden_state=torch.randn(2, 5, 6), hidden_states=states)
    bridge = SwitchBridge(BridgePlan((6, 8), layer=-2, grid=(2, 3), class_tokens=(1, 1)))
    bridged = bridge(output)
    assert bridged.hidden_states[1].shape == (2, 1 + 9, 8)
    torch.testing.assert_close(bridged.hidden_states[1][:, 0], bridge.linear(states[1][:, 0]))
    torch.testing.assert_close(
        bridged.hidden_states[1][:, 1:], bridge.linear(resampled(states[1][:, 1:], 2, 3))
    )
    assert bridged.hidden_states[2] is states[2]
    assert output.hidden_states is states
    # Between widths it begins as an isometry.
    gram = bridge.linear.weight.T @ bridge.linear.weight
    torch.testing.assert_close(gram, torch.eye(6))
    with pytest.raises(CachekdError, match="another number of tokens") as caught:
        bridge(BaseModelOutputWithPooling(hidden_states=(torch.zeros(2, 10, 6),) * 3))
    assert "1 + 2 x 2" in str(caught.value)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"), [(0, 1, (2, 1 + 4, 6)), (1, 0, (2, 4, 6)), (1, 1, (2, 5, 6))]
)
def test_a_class_token_that_the_other_side_lacks(ours, theirs, shape):
    tokens = torch.randn(2, ours + 4, 6)
    bridge = SwitchBridge(BridgePlan((6, 6), grid=(2, 2), class_tokens=(ours, theirs)))
    bridged = bridge(BaseModelOutputWithPooling(last_hidden_state=tokens)).last_hidden_state
    assert bridged.shape == shape
    # Of equal widths it begins as the identity.
    torch.testing.assert_close(bridged[:, theirs:], tokens[:, ours:])


def encoded_batch(path: str, data: str) -> tuple[dict, torch.Tensor]:
    encoder = SampleEncoder(load_processor(path))
    batch = collate([encoder(open_samples(data)[i]) for i in range(2)], 0)
    return batch, predicting_positions(batch.pop("supervised"))


def test_an_identity_equals_the_plain_switch(pair):
    """Equal shapes, as training would refuse: V_S is another model of the teacher's shape."""
    teacher = SwitchedTeacher(load_model(pair["teacher"], dtype=torch.float32, device=CPU))
    student = tiny_vlm(tiny_processor(), vision_layers=3, seed=5)
    batch, positions = encoded_batch(pair["teacher"], pair["data"])
    output = encode(student, batch)
    bridge = SwitchBridge(BridgePlan((32, 32), layer=-1, grid=(4, 4), class_tokens=(1, 1)))
    bridged, plain = (teacher.logits(out, batch, positions) for out in (bridge(output), output))
    torch.testing.assert_close(bridged, plain)
    nn.init.normal_(bridge.linear.weight)
    assert not torch.allclose(teacher.logits(bridge(output), batch, positions), plain, atol=1e-2)


@pytest.mark.parametrize(
    "family",
    ["llava", "paligemma", "gemma3", "llava_next", "llava_onevision", "idefics3", "smolvlm", "internvl"],
)
def test_every_family_that_takes_one_gets_the_features_of_its_own_shape(family):
    """V_S of another width, and where that is sound of half the grid, through the teacher's projector."""
    tiny = FAMILIES[family]
    tok = tiny.processor().tokenizer
    configs = {"teacher": tiny.config(tok, 16, 24), "student": tiny.config(tok, 32, 16)}
    if family in ("llava", "paligemma", "gemma3"):
        configs["student"].vision_config.image_size *= 2
    models = {}
    for name, config in configs.items():
        torch.manual_seed(len(models))
        models[name] = AutoModelForImageTextToText.from_config(config).eval()
        _wake(models[name])
    bridge = SwitchBridge(plan_bridge(configs["teacher"], configs["student"]))
    assert (bridge.plan.grid is not None) == (family in ("llava", "paligemma", "gemma3"))
    inputs = {}
    for name, config in configs.items():
        size = config.vision_config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        tiles = {"llava_next": (1, 3), "llava_onevision": (1, 3), "idefics3": (1, 2), "smolvlm": (1, 2)}
        shape = (*tiles.get(family, (2,)), 3, height, width)
        inputs[name] = {"pixel_values": torch.randn(shape)}
        if family.startswith("llava_"):
            inputs[name]["image_sizes"] = torch.tensor([[28, 56]])
    with torch.no_grad():
        own = project(models["teacher"], encode(models["teacher"], inputs["teacher"]), inputs["teacher"])
    vision = encode(models["student"], inputs["student"])
    features = project(models["teacher"], bridge(vision), inputs["teacher"])
    theirs, ours = (torch.cat([*x.pooler_output]) for x in (own, features))
    assert ours.shape == theirs.shape
    ours.square().sum().backward()
    assert bridge.linear.weight.grad.abs().sum() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in models["student"].parameters())


# ---- which pairs


def config_of(**kwargs):
    return tiny_vlm(tiny_processor(), **kwargs).config


def test_clip_and_siglip_meet_where_the_class_token_is_dropped():
    clip, siglip = config_of(), config_of(tower="siglip", vision_width=48)
    plan = plan_bridge(clip, siglip)
    assert (plan.class_tokens, plan.grid, plan.other_text) == ((0, 1), (4, 4), False)
    assert plan_bridge(siglip, clip).class_tokens == (1, 0)
    clip.vision_feature_select_strategy = "full"
    with pytest.raises(CachekdError, match="reads a class token"):
        plan_bridge(clip, siglip)


def test_pairs_that_no_bridge_mends_are_refused():
    teacher = config_of()
    with pytest.raises(CachekdError, match="nothing to do"):
        plan_bridge(teacher, config_of(vision_layers=1))
    with pytest.raises(CachekdError, match="cannot be switched") as caught:
        plan_bridge(teacher, config_of(vision_width=48, feature_layer=-2))
    assert "vision_feature_layer" in str(caught.value)
    with pytest.raises(CachekdError, match="cannot be switched"):
        plan_bridge(teacher, FAMILIES["gemma3"].config(FAMILIES["gemma3"].processor().tokenizer, 16, 16))
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3"):
        tok = FAMILIES[family].processor().tokenizer
        with pytest.raises(CachekdError, match="no bridge is sound here"):
            plan_bridge(FAMILIES[family].config(tok, 16, 16), FAMILIES[family].config(tok, 32, 16))
    tok = FAMILIES["llava_next"].processor().tokenizer
    tiled = [FAMILIES["llava_next"].config(tok, width, 16) for width in (16, 32)]
    tiled[1].vision_config.image_size = 14
    with pytest.raises(CachekdError, match="an image has another number of them") as caught:
        plan_bridge(*tiled)
    assert "vision_config.image_size 14, not 28" in caught.value.found
    assert "bridge" not in caught.value.fix  # which has just been refused


def test_runs_that_a_bridge_does_not_fit_are_refused(pair, tmp_path, student_path):
    with pytest.raises(CachekdError, match="nothing would train the switch bridge"):
        TrainConfig(**pair, out=tmp_path / "x", lambda_vsd=0.0)
    with pytest.raises(CachekdError, match="nothing to do"):
        make_trainer(TrainConfig(**pair | {"student": str(student_path)}, out=tmp_path / "x"), tmp_path)
    with pytest.raises(CachekdError, match="cannot be switched") as caught:
        make_trainer(TrainConfig(**pair | {"switch_bridge": None}, out=tmp_path / "x"), tmp_path)
    assert "--switch-bridge linear (beyond the paper)" in str(caught.value.fix)


def test_check_names_the_bridge_and_accepts_it(pair):
    models = ["--teacher", pair["teacher"], "--student", pair["student"], "--data", pair["data"]]
    report = checked(*models[1::2])
    refused = [row for row in report.rows if row.state == "refused"]
    assert refused
    assert all(row.fix.startswith("--switch-bridge linear (beyond the paper)") for row in refused)
    done = CliRunner().invoke(app, ["check", *models, "--switch-bridge", "linear", "--json"])
    assert done.exit_code == 0, done.output
    (row,) = (row for row in json.loads(done.stdout)["rows"] if row["name"] == "switch bridge")
    assert row["state"] == "note"
    assert "width 48 to 32, 2 x 2 patches to 4 x 4" in row["found"]
    needless = checked(pair["teacher"], pair["teacher"], pair["data"], switch_bridge="linear")
    (row,) = (row for row in needless.rows if row.name == "switch bridge")
    assert row.state == "refused"
    assert "nothing to do" in row.text
    other = CliRunner().invoke(app, ["check", *models, "--switch-bridge", "cubic"])
    assert isinstance(other.exception, CachekdError)
    assert other.exception.problem == "setting 'switch_bridge': input should be 'linear'"


# ---- training


def test_the_switched_path_is_the_teachers_text_with_the_bridged_features(pair, tmp_path):
    """L_VSD from the parts by hand; its gradient is in V_S and the bridge."""
    trainer = make_trainer(TrainConfig(**pair, out=tmp_path / "x"), tmp_path / "t")
    batch = collate_with_targets([trainer.train_dataset[i] for i in range(3)], 0)
    vsd = trainer.terms_of(trainer.model, batch).terms["vsd"]
    positions = predicting_positions(batch.teacher.supervised)
    assert positions.shape[1] - batch.student.supervised.shape[1] == 16 - 4
    with capture_vision(trainer.vlm) as vision:
        trainer.vlm(**batch.student.tensors)
    logits = trainer.teacher.logits(trainer.bridge(vision.output), batch.teacher.tensors, positions)
    targets = batch.targets
    how = {"window": targets.window, "min_k": targets.min_k, "temperature": 3.0, "reduction": "sum"}
    expected = dbild_loss(logits[:, : targets.vocab_size], targets, **how)
    torch.testing.assert_close(vsd, expected)
    vsd.backward()
    touched = {name for name, p in trainer.vlm.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert all(name.startswith("model.vision_tower.") for name in touched)
    assert all(p.grad.any() for p in trainer.bridge.parameters())
    assert all(p.grad is None for p in trainer.teacher.model.parameters())


def losses(out: Path) -> list[tuple[float, ...]]:
    log = json.loads((out / RUN_FILE).read_text())["log"]
    return [
        tuple(entry[n] for n in ("loss", "ce", "align", "vsd", "grad_norm")) for entry in log if "ce" in entry
    ]


def test_a_run_trains_the_bridge_saves_it_beside_the_student_and_can_be_resumed(pair, tmp_path):
    whole = TrainConfig(**pair, out=tmp_path / "whole", save_steps=2)
    start = SwitchBridge(plan_bridge_of(pair)).state_dict()
    train(whole)
    entries = losses(whole.out)
    assert len(entries) == 6
    assert all(np.isfinite(entries).flatten())
    bridge = load_file(whole.out / BRIDGE_FILE)
    for name, weight in bridge.items():
        assert not torch.allclose(weight, start[name], atol=1e-4), name

    run = json.loads((whole.out / RUN_FILE).read_text())
    assert run["config"]["switch_bridge"] == "linear"
    assert run["switch_bridge"]["beyond_the_paper"] is True
    assert run["switch_bridge"]["parameters"] == 48 * 32 + 32
    student, info = AutoModelForImageTextToText.from_pretrained(whole.out, output_loading_info=True)
    assert not any(info.values())
    assert BRIDGE_FILE not in {path.name for path in weights_files(str(whole.out))}
    assert all(torch.isfinite(weight).all() for weight in student.parameters())

    config = TrainConfig(**pair, out=tmp_path / "cut", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(5)])
    assert train(config).resumed_from == 4
    assert losses(config.out) == entries
    for name in (BRIDGE_FILE, "model.safetensors"):
        again, weights = load_file(config.out / name), load_file(whole.out / name)
        assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_the_best_students_bridge_is_saved_with_it(pair, tmp_path):
    """Held-out terms run through it, and it goes back with the student. (Here the worst one is the best.)"""
    training = {"load_best_model_at_end": True, "greater_is_better": True}
    held_out = {"eval_data": pair["data"], "eval_cache": pair["cache"], "eval_steps": 1, "save_steps": 100}
    settings = pair | held_out | {"keep_checkpoints": True}
    config = TrainConfig(**settings, out=tmp_path / "run", training=training)
    summary = train(config)
    assert summary.best_step < summary.steps
    found = [
        load_file(config.out / name / BRIDGE_FILE)
        for name in (".", f"checkpoints/checkpoint-{summary.best_step}")
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])
    # A batch of the training data, in eval mode: the mean that training computes.
    trainer = make_trainer(config.model_copy(update={"student": str(config.out)}), tmp_path / "t")
    trainer.bridge.load(config.out)
    batch = collate_with_targets([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))], 0)
    terms = trainer.terms_of(trainer.model, batch)
    for name in ("ce", "align", "vsd"):
        mean = float(terms.terms[name].detach() / terms.tokens)
        assert summary.evaluation[f"eval_{name}"] == pytest.approx(mean, rel=1e-4), name


def plan_bridge_of(pair: dict) -> BridgePlan:
    return plan_bridge(load_config(pair["teacher"]), load_config(pair["student"]))


def test_its_gradients_are_clipped_with_the_students_and_start_anew_in_each_step(pair, tmp_path):
    """Two halves of a batch are one batch, to the bridge too; one norm is of both."""
    found = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        changed = {"batch_size": batch_size, "gradient_accumulation": accumulation, "max_grad_norm": 1e-3}
        changed |= {"training": {"max_steps": 2, "optim": "sgd"}, "save_steps": 0}
        trainer = make_trainer(TrainConfig(**pair | changed, out=tmp_path / "x"), tmp_path / str(batch_size))
        norms = []

        def keep(_optimizer, _args, _kwargs, trainer=trainer, norms=norms):
            parameters = [*trainer.vlm.parameters(), *trainer.bridge.parameters()]
            gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))
            norms.append(float(trainer.bridge.linear.weight.grad.norm()))

        trainer.create_optimizer().register_step_pre_hook(keep)
        trainer.train()
        found.append(norms)
    assert found[0][::2] == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert found[0][1] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_an_estimate_counts_it(pair, tmp_path):
    estimate = estimate_training(TrainConfig(**pair, out=tmp_path / "x"))
    assert estimate.bridge_parameters == 48 * 32 + 32
    assert estimate.memory["switch bridge"] == 4 * (48 * 32 + 32)
    moments = 2 * 4 * (estimate.trained_parameters + estimate.bridge_parameters)
    assert estimate.memory["optimizer"] == pytest.approx(moments, rel=0.05)


@pytest.mark.slow
def test_two_processes_equal_one_though_one_of_them_never_switches(pair, tmp_path):
    """Samples in order, one a process; the cache lacks every second one: the second has no L_VSD."""
    records = json.loads(Path(pair["data"]).read_text())[:8]
    for record in records:
        record["image"] = str(Path(pair["data"]).parent / record["image"])
    data, half = tmp_path / "data.json", tmp_path / "half.json"
    data.write_text(json.dumps(records))
    half.write_text(json.dumps(records[::2]))
    dump(DumpConfig(teacher=pair["teacher"], data=str(half), out=tmp_path / "cache"))
    changed = {"data": str(data), "cache": str(tmp_path / "cache"), "missing": "ce-only", "save_steps": 0}
    changed |= {"training": {"optim": "sgd", "train_sampling_strategy": "sequential"}, "learning_rate": 0.1}
    changed |= {"epochs": 1, "lambda_vsd": 100}  # a random teacher hardly cares what it sees
    train(TrainConfig(**pair | changed | {"batch_size": 2, "out": tmp_path / "one"}))
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps(pair | changed | {"batch_size": 1, "out": str(tmp_path / "two")}))
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    np.testing.assert_allclose(two, one, rtol=1e-4)
    weights = [load_file(tmp_path / name / BRIDGE_FILE) for name in ("one", "two")]
    start = SwitchBridge(plan_bridge_of(pair)).state_dict()
    for name, weight in weights[0].items():
        moved = float((weight - start[name]).abs().max())
        assert moved > 1e-4
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-2 * moved)
