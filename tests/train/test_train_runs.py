"""Stage two as a run: settings of the Trainer, resuming, token weights, failures, adapters."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainerCallback

from cachekd.atomic import _HERE
from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.models import load_model
from cachekd.paths import RUN_FILE
from cachekd.train import SwitchKDTrainingArguments, train
from cachekd.train.arguments import FIELDS, OWN_NAMES, REFUSED
from cachekd.train.estimate import estimate_training
from cachekd.train.folder import STARTED_FILE
from cachekd.train.open import make_trainer
from launch import FORKS, cachekd
from runs import CutShort, losses
from tiny import save_vlm, tar_members, tiny_processor, write_tar

# ---- the Trainer's settings


def test_any_field_of_the_trainer_goes_through(settings, tmp_path):
    training = {"lr_scheduler_type": "constant", "adam_beta2": 0.9, "max_steps": 3, "optim": "adafactor"}
    arguments = SwitchKDTrainingArguments.of(TrainConfig(**settings, training=training), tmp_path)
    assert (arguments.adam_beta2, arguments.max_steps, arguments.optim) == (0.9, 3, "adafactor")
    assert arguments.learning_rate == 1e-3
    assert train(TrainConfig(**settings, training=training)).steps == 3


@pytest.mark.parametrize("name", [*OWN_NAMES, *REFUSED, "no_such_field"])
def test_names_that_conflict_are_refused(settings, tmp_path, name):
    value = not getattr(SwitchKDTrainingArguments, name, None)
    with pytest.raises(CachekdError) as caught:
        SwitchKDTrainingArguments.of(TrainConfig(**settings, training={name: value}), tmp_path)
    assert f"training.{name}" in str(caught.value)
    assert REFUSED.get(name, "") in str(caught.value)
    if name in OWN_NAMES:
        assert f"set `{OWN_NAMES[name]}` at the top level, outside `training`" in str(caught.value)


def test_own_names_and_refused_names_are_the_trainers(settings):
    assert set(REFUSED) <= FIELDS
    assert set(OWN_NAMES.values()) <= set(TrainConfig.model_fields)


def test_a_value_that_the_trainer_refuses_is_explained(settings):
    with pytest.raises(CachekdError, match="the Trainer refuses") as caught:
        train(TrainConfig(**settings, training={"lr_scheduler_type": "zigzag"}))
    assert "zigzag" in str(caught.value)
    assert not settings["out"].exists()


@pytest.mark.parametrize("changed", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}])
def test_mixed_precision_and_checkpointing_stay_near_the_plain_losses(settings, tmp_path, changed):
    train(TrainConfig(**settings))
    train(TrainConfig(**settings | changed | {"out": tmp_path / "other"}))
    tolerance = 0.05 if "dtype" in changed else 1e-3
    for ours, plain in zip(losses(tmp_path / "other"), losses(settings["out"]), strict=True):
        assert ours == pytest.approx(plain, rel=tolerance, abs=tolerance / 50)


def test_checkpointing_recomputes_the_layers_of_both_models(settings, tmp_path):
    trainer = make_trainer(TrainConfig(**settings, gradient_checkpointing=True), tmp_path)
    calls = {"student": 0, "teacher": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name, model in (("student", trainer.vlm), ("teacher", trainer.teacher.model)):
        layer = model.model.language_model.layers[0]
        layer.self_attn.register_forward_hook(count(name))
        assert not trainer.teacher.model.model.language_model.layers[0].mlp.training
    trainer.train()
    # 6 steps, forward and again. Before, the terms were tried: L_CE and L_Align go back through the student.
    assert calls == {"student": 12 + 1 + 2, "teacher": 12 + 1 + 1}


# ---- token weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulation_of_4_times_2_equals_a_batch_of_8(settings, tmp_path, dtype):
    write_tar(tmp_path / "eight" / "0.tar", tar_members(8))
    gradients = []
    for name, batch_size, accumulation in (("whole", 8, 1), ("parts", 2, 4)):
        changed = {"batch_size": batch_size, "gradient_accumulation": accumulation, "epochs": 1}
        changed |= {"data": str(tmp_path / "eight"), "max_grad_norm": 0.0, "warmup": 0.0, "dtype": dtype}
        trainer = make_trainer(TrainConfig(**settings | changed), tmp_path / name)
        found = {}

        def keep(_optimizer, _args, _kwargs, trainer=trainer, found=found):
            found |= {n: p.grad.clone() for n, p in trainer.vlm.named_parameters() if p.grad is not None}

        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(keep)
        trainer.train()
        assert trainer.state.global_step == 1
        gradients.append(torch.cat([gradient.flatten() for gradient in found.values()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < (1e-5 if dtype == "float32" else 0.03)


# ---- cut short, and gone on with


@pytest.mark.parametrize(("cuts", "lora"), [((3, 5), None), ((5,), {"r": 4, "target_modules": "all-linear"})])
def test_a_resumed_run_equals_one_that_was_never_stopped(settings, tmp_path, cuts, lora):
    settings |= {"lora": lora, "save_steps": 2}
    whole = TrainConfig(**settings | {"out": tmp_path / "whole"})
    train(whole)
    for cut in cuts:
        config = TrainConfig(**settings | {"out": tmp_path / str(cut)})
        with pytest.raises(KeyboardInterrupt):
            train(config, [CutShort(cut)])
        assert (config.out / STARTED_FILE).exists()
        assert not (config.out / RUN_FILE).exists()
        summary = train(config)
        assert (summary.resumed_from, summary.steps) == (cut - 1, 6)
        assert losses(config.out) == losses(whole.out)
        weights = [load_file(out / "model.safetensors") for out in (config.out, whole.out)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1]), cut


def test_a_checkpoint_that_was_cut_short_is_passed_over(settings):
    config = TrainConfig(**settings | {"save_steps": 2})
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(5)])
    (config.out / "checkpoints" / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 1')
    assert train(config).resumed_from == 2


def test_a_finished_run_is_never_overwritten(settings):
    config = TrainConfig(**settings | {"epochs": 1})
    train(config)
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    with pytest.raises(CachekdError, match="never overwritten"):
        train(config)
    assert before == {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}


def test_a_run_begun_with_other_settings_is_not_gone_on_with(settings):
    config = TrainConfig(**settings | {"save_steps": 2})
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(3)])
    with pytest.raises(CachekdError, match="other settings") as caught:
        train(TrainConfig(**settings | {"save_steps": 2, "learning_rate": 2e-3}))
    assert "learning_rate: 0.001" in str(caught.value)
    assert "learning_rate: 0.002" in str(caught.value)


def test_a_folder_of_something_else_is_left_alone(settings):
    settings["out"].mkdir()
    (settings["out"] / "thesis.tex").write_text("x")
    with pytest.raises(CachekdError, match="already holds something"):
        train(TrainConfig(**settings))
    assert (settings["out"] / "thesis.tex").exists()


def test_a_run_killed_before_it_began_leaves_nothing_in_the_way(settings):
    """The Trainer has made its folder, or the mark of the run was being written."""
    (settings["out"] / "checkpoints").mkdir(parents=True)
    half_made = settings["out"] / f".{STARTED_FILE}.tmp-{_HERE}-999999999-00000000"
    half_made.write_text("{")
    assert train(TrainConfig(**settings | {"epochs": 1})).resumed_from == 0
    assert not half_made.exists()


def test_a_run_cut_short_before_its_first_checkpoint_leaves_nothing(settings):
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings), [CutShort(1)])
    assert not settings["out"].exists()


# ---- what goes wrong


def test_samples_beyond_the_cache_train_by_ce_alone(settings, tmp_path):
    """12 samples that the cache has and 2 that it lacks, in one step."""
    write_tar(tmp_path / "more" / "0.tar", tar_members(14))
    changed = {"data": str(tmp_path / "more"), "missing": "ce-only", "batch_size": 14, "epochs": 1}
    summary = train(TrainConfig(**settings | changed))
    assert summary.uncovered == 2
    assert json.loads((settings["out"] / RUN_FILE).read_text())["uncovered_samples"] == 2
    plain = train(TrainConfig(**settings | {"out": tmp_path / "twelve", "batch_size": 12, "epochs": 1}))
    # The same samples carry the teacher's terms; L_CE is over all.
    for name in ("align", "vsd"):
        assert summary.terms[name] == pytest.approx(plain.terms[name], rel=1e-4)
    everything = {"lambda_align": 0.0, "lambda_vsd": 0.0, "cache": None, "out": tmp_path / "ce"}
    ce = train(TrainConfig(**settings | changed | everything))
    assert summary.terms["ce"] == pytest.approx(ce.terms["ce"], rel=1e-5)


def test_a_cache_of_other_data_is_refused_even_so(settings, tmp_path):
    write_tar(tmp_path / "other" / "0.tar", tar_members(3, start=50))
    with pytest.raises(CachekdError, match="lacks samples") as caught:
        train(TrainConfig(**settings | {"data": str(tmp_path / "other"), "missing": "ce-only"}))
    assert "cachekd bind" in caught.value.fix
    assert "ce-only" not in caught.value.fix  # that is what was asked for
    with pytest.raises(CachekdError, match="lacks samples") as caught:
        train(TrainConfig(**settings | {"data": str(tmp_path / "other")}))
    assert "cachekd bind" in caught.value.fix
    assert "--missing" not in caught.value.fix  # which would be refused: nothing would be left


def test_a_loss_that_is_not_finite_stops_and_can_be_seen_again(settings):
    """One step too long; the second, of two batches, has no finite loss."""
    changed = {"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup": 0.0}
    config = TrainConfig(**settings | changed | {"batch_size": 2, "gradient_accumulation": 2})
    with pytest.raises(CachekdError, match="the loss is not finite") as caught:
        train(config)
    (path,) = (config.out / "checkpoints").glob("not-finite*.pt")
    text = str(caught.value)
    assert str(path) in text
    assert "a run that diverged" in text
    assert "lower --learning-rate" in text
    saved = torch.load(path, weights_only=False)
    (batch,) = saved["batches"]
    assert len(batch["keys"]) == 2
    assert all(repr(key) in text for key in batch["keys"])
    trainer = make_trainer(config, config.out / "again")
    trainer.vlm.load_state_dict(saved["student"])
    assert not torch.isfinite(trainer.compute_loss(trainer.model, batch["batch"]))
    assert not (config.out / RUN_FILE).exists()


class NotFinite(TrainerCallback):
    """A gradient of NaN beside a loss that is fine, in a step's backward."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            weight = next(model.parameters())
            weight.register_hook(lambda gradient: gradient * float("nan"))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are(settings):
    """In the last step, after which no loss would tell."""
    config = TrainConfig(**settings | {"save_steps": 2})
    with pytest.raises(CachekdError, match="the gradient is not finite") as caught:
        train(config, [NotFinite(6)])
    assert "step 6" in str(caught.value)
    assert "look at these samples" in str(caught.value)
    (path,) = (config.out / "checkpoints").glob("not-finite*.pt")
    saved = torch.load(path, weights_only=False)
    assert all(weight.isfinite().all() for weight in saved["student"].values())
    assert not (config.out / RUN_FILE).exists()
    assert train(config).resumed_from == 4


def test_weights_that_are_not_finite_are_not_saved(settings):
    """The last step is too long for any weight; there is no loss after it."""
    changed = {"learning_rate": 3e38, "warmup": 0.0, "training": {"max_steps": 1}}
    with pytest.raises(CachekdError, match="the student's weights are not finite") as caught:
        train(TrainConfig(**settings | changed))
    assert "of at most 3e+38" in str(caught.value)
    assert not (settings["out"] / RUN_FILE).exists()


def test_a_compiled_student_is_refused_where_its_vision_encoder_is_listened_to(settings):
    with pytest.raises(CachekdError, match="a compiled one") as caught:
        train(TrainConfig(**settings, training={"torch_compile": True}))
    assert "--lambda-vsd 0" in str(caught.value)


def test_out_of_memory_says_what_to_turn(settings):
    class Greedy(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.empty(2**50)

    with pytest.raises(CachekdError, match="out of memory") as caught:
        train(TrainConfig(**settings), [Greedy()])
    assert "--gradient-checkpointing" in str(caught.value)
    assert "--batch-size 2 --gradient-accumulation 2" in str(caught.value)
    assert "--logit-chunk" in str(caught.value)
    assert not settings["out"].exists()


def test_the_estimate_leaves_nothing_and_counts_right(settings, student_path):
    estimate = estimate_training(TrainConfig(**settings))
    student = AutoModelForImageTextToText.from_pretrained(student_path)
    size = sum(p.numel() for p in student.parameters())
    assert estimate.student_parameters == estimate.trained_parameters == size
    assert estimate.steps == 6
    assert estimate.measured_steps == 3
    assert estimate.memory["optimizer"] >= 2 * 0.9 * 4 * size  # AdamW, where there are gradients
    assert 0.9 * 4 * size <= estimate.memory["gradients"] <= 4 * size
    assert sum(estimate.memory.values()) == estimate.peak_bytes
    assert estimate.memory["before the models"] > 50e6  # Python and its libraries: they are no activations
    assert estimate.seconds_per_step > 0
    assert not settings["out"].exists()
    assert estimate.settings["batch_size"] == 4
    assert estimate.settings["trainable"] == ["vision_encoder", "projector", "language_model"]


def test_the_estimates_peak_is_of_the_longest_samples(settings, tmp_path):
    """Two of 20 samples are long, and not among the first."""
    members = tar_members(20)
    for index in (2 * 17 + 1, 2 * 19 + 1):
        name, content = members[index]
        record = json.loads(content)
        record["conversations"][-1]["value"] += " and a red cat" * 400
        members[index] = (name, json.dumps(record).encode())
    write_tar(tmp_path / "long" / "0.tar", members)
    changed = {"data": str(tmp_path / "long"), "batch_size": 2, "lambda_align": 0.0, "lambda_vsd": 0.0}
    plain = {"cache": None, "teacher": None, "training": {"train_sampling_strategy": "sequential"}}
    wide = shutil.copytree(settings["student"], tmp_path / "wide") / "config.json"
    wide.write_text(
        wide.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 4096')
    )
    estimate = estimate_training(TrainConfig(**settings | changed | plain | {"student": str(wide.parent)}))
    assert estimate.longest_batch[0] == 2
    assert estimate.longest_batch[1] > 1200
    assert estimate.peak_bytes == max(estimate.longest_peak_bytes, estimate.random_peak_bytes)
    assert estimate.longest_peak_bytes > estimate.random_peak_bytes
    assert estimate.logits_bytes > 4 * 200


def test_an_estimate_reports_nowhere(settings, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    training = {"report_to": ["tensorboard"], "push_to_hub": True, "save_strategy": "epoch"}
    estimate_training(TrainConfig(**settings, training=training))
    assert not list(tmp_path.rglob("*tfevents*"))
    trainer = make_trainer(
        TrainConfig(**settings, training=training | {"push_to_hub": False}), tmp_path / "t"
    )
    assert any(type(c).__name__ == "TensorBoardCallback" for c in trainer.callback_handler.callbacks)


# ---- adapters and quantised weights


def test_adapters_train_and_are_merged_into_a_plain_model(settings, student_path):
    pytest.importorskip("peft")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    config = TrainConfig(**settings, lora=lora)
    summary = train(config)
    assert set(summary.terms) == {"ce", "align", "vsd"}
    assert (config.out / "adapter" / "adapter_model.safetensors").exists()
    start = load_file(Path(student_path) / "model.safetensors")
    end = load_file(config.out / "model.safetensors")
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed
    assert all("proj" in name or "fc" in name or "linear" in name for name in changed)


def test_what_peft_refuses_is_explained(settings):
    pytest.importorskip("peft")
    with pytest.raises(CachekdError, match="peft refuses"):
        train(TrainConfig(**settings, lora={"r": 4, "target_modules": ["no_such_layer"]}))
    with pytest.raises(CachekdError, match="peft refuses"):
        train(TrainConfig(**settings, lora={"rank": 4}))


def test_quantised_weights_need_adapters_and_a_known_method(settings):
    with pytest.raises(CachekdError, match="quantised weights cannot be trained"):
        train(TrainConfig(**settings, student_quantization={"load_in_4bit": True}))
    with pytest.raises(CachekdError, match="no such quantisation"):
        train(TrainConfig(**settings, teacher_quantization={"quant_method": "magic"}))


def test_bitsandbytes_settings_reach_transformers():
    from cachekd.models.quantization import quantization_config

    config = quantization_config({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    assert type(config).__name__ == "BitsAndBytesConfig"
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"


# ---- what is not read


def test_the_teachers_vision_encoder_is_never_read(settings, tmp_path, teacher_path, monkeypatch):
    """Its weights are taken out of the file: with a cache nothing needs them."""
    from safetensors.torch import save_file

    folder = shutil.copytree(teacher_path, tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    left = {name: value for name, value in weights.items() if "vision_tower" not in name}
    assert len(left) < len(weights)
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    train(TrainConfig(**settings))
    monkeypatch.setattr("cachekd.check.rows.check_teacher", lambda *_: None)  # the file's hash has changed
    train(TrainConfig(**settings | {"teacher": str(folder), "out": tmp_path / "blind"}))
    assert losses(tmp_path / "blind") == losses(settings["out"])
    live = {"teacher": str(folder), "cache": None, "live_teacher": True, "out": tmp_path / "live"}
    with pytest.raises(CachekdError, match="weights would be random"):
        train(TrainConfig(**settings | live))


def growth(small: Path, large: Path, tower: bool) -> int:
    """Bytes by which this process grows at the most while it loads the second."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    # bfloat16: a float32 file of which nothing is converted would be mapped, not read.
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "tower": tower}
    load_model(str(small), **options)  # what libraries hold
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak()
    load_model(str(large), **options)
    return peak() - before


@pytest.mark.slow
def test_the_vision_encoders_bytes_stay_on_disk(tmp_path, teacher_path):
    """A tower of 80 MB: loading the rest of the teacher does not touch its pages."""
    folder = save_vlm(tmp_path / "big", tiny_processor(), vision_width=512, vision_layers=10)
    assert (folder / "model.safetensors").stat().st_size > 80e6

    def grows(tower: bool) -> int:
        with ProcessPoolExecutor(1, FORKS) as process:
            return process.submit(growth, teacher_path, folder, tower).result()

    assert grows(tower=True) > 60e6
    assert grows(tower=False) < 10e6


@pytest.mark.slow
def test_estimate_and_live_teacher_on_the_command_line(settings, tmp_path):
    command = ["train", "--live-teacher", "--batch-size", "4"]
    for name in ("student", "teacher", "data", "out"):
        command += [f"--{name}", str(settings[name])]
    done = cachekd(*command, "--estimate", "--json")
    assert json.loads(done.stdout)["steps"] == 3
    assert not settings["out"].exists()
    done = cachekd(*command, "--json")
    assert json.loads(done.stdout)["steps"] == 3
    done = cachekd(*command)
    assert done.returncode == 2
    assert "never overwritten" in done.stderr
