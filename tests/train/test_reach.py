"""Each term's gradient reaches what it trains, or the run is refused before its first step."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.losses.terms import TERMS
from cachekd.models.families import changed
from cachekd.paths import RUN_FILE
from cachekd.train.batch import Example
from cachekd.train.folder import RunFolder
from cachekd.train.open import make_trainer
from cachekd.train.reach import prove_gradients
from cachekd.train.run import train
from caches import dump_cache
from runs import CutShort, losses
from tiny import save_vlm, tiny_processor


class _NoBackward(torch.autograd.Function):
    """A kernel that computes a product and has no backward: its gradient is zero."""

    @staticmethod
    def forward(ctx, states, weight):
        ctx.save_for_backward(states)
        return states @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(ctx.saved_tensors[0]), None


def without_backward(model: nn.Module) -> None:
    """As a backend does that is made for inference."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, module=module: _NoBackward.apply(x, module.weight)


def refused(trainer) -> CachekdError:
    with pytest.raises(CachekdError) as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    return caught.value


def test_a_teacher_without_backward_is_refused_with_term_part_and_backend(settings, tmp_path):
    trainer = make_trainer(TrainConfig(**settings), tmp_path)
    without_backward(trainer.teacher.model.model.language_model)
    error = refused(trainer)
    assert error.problem == "L_VSD has no gradient at the student's vision encoder"
    assert f"the teacher, {settings['teacher']}: no quantisation, attention sdpa, on cpu" in error.where
    assert "--lambda-vsd 0" in error.fix


def test_a_student_without_backward_is_refused(settings, tmp_path):
    trainer = make_trainer(TrainConfig(**settings, lambda_align=0, lambda_vsd=0), tmp_path)
    without_backward(trainer.vlm.model.language_model)
    error = refused(trainer)
    assert error.problem == "L_CE has no gradient at the student's vision encoder"
    assert "the student" in error.where


def test_a_gradient_that_is_not_finite_is_refused(settings, tmp_path):
    trainer = make_trainer(TrainConfig(**settings), tmp_path)
    projector = trainer.teacher.model.model.multi_modal_projector
    projector.register_full_backward_hook(lambda _module, given, _: (given[0] * float("nan"),))
    error = refused(trainer)
    assert error.problem == "L_VSD has a gradient that is not finite at the student's vision encoder"


def test_a_teacher_whose_weights_require_a_gradient_is_refused(settings, tmp_path):
    trainer = make_trainer(TrainConfig(**settings), tmp_path)
    trainer.teacher.model.requires_grad_(True)
    assert "at the teacher, which is frozen" in refused(trainer).problem


def test_a_switched_path_that_reaches_the_projector_is_refused(settings, tmp_path):
    trainer = make_trainer(TrainConfig(**settings), tmp_path)
    student, switched = trainer.vlm, trainer.teacher.logits
    weight = student.model.multi_modal_projector.linear_1.weight

    def through_the_projector(output, *others):
        factor = weight.square().sum()
        states = [None if state is None else state * factor for state in output.hidden_states]
        last = output.last_hidden_state * factor
        return switched(changed(output, hidden_states=states, last_hidden_state=last), *others)

    trainer.teacher.logits = through_the_projector
    problem = refused(trainer).problem
    assert problem == "L_VSD has a gradient where it should have none, at the student's projector"


def test_four_bits_that_repack_themselves_are_refused(settings, tmp_path, monkeypatch):
    """As bitsandbytes' layers do on such a CPU, where loading does not mend it."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, and there bitsandbytes does not repack")
    monkeypatch.setattr("cachekd.models.loading.with_gradients", lambda model: model)
    wide = {"text_width": 64, "vision_width": 64}  # what one block of its weights needs
    models = {
        name: str(save_vlm(tmp_path / name, tiny_processor(), **wide, seed=seed))
        for name, seed in (("teacher", 1), ("student", 2))
    }
    cache = dump_cache(tmp_path / "cache", Path(models["teacher"]), Path(settings["data"]))
    models |= {"cache": str(cache), "teacher_quantization": "4bit"}
    error = refused(make_trainer(TrainConfig(**settings | models), tmp_path / "run"))
    assert error.problem == "L_VSD has no gradient at the student's vision encoder"
    assert "quantised by bitsandbytes" in error.where


def test_a_backend_without_backward_is_refused(settings, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    dynamic = {"quant_method": "torchao", "quant_type": "Int8DynamicActivationInt8WeightConfig"}
    error = refused(make_trainer(TrainConfig(**settings, teacher_quantization=dynamic), tmp_path))
    assert error.problem == "L_VSD has no gradient at the student's vision encoder"
    assert "quantised by torchao" in error.where


@pytest.mark.parametrize(
    ("package", "setting"),
    [
        ("torchao", {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}),
        ("torchao", {"quant_method": "torchao", "quant_type": "Float8WeightOnlyConfig"}),
        ("optimum.quanto", {"quant_method": "quanto", "weights": "int8"}),
        ("optimum.quanto", {"quant_method": "quanto", "weights": "float8"}),
        ("bitsandbytes", "8bit"),
    ],
)
def test_a_backend_that_has_one_trains(settings, tmp_path, package, setting):
    pytest.importorskip(package, reason=f"{package} is not installed")
    trainer = make_trainer(TrainConfig(**settings | {"epochs": 1}, teacher_quantization=setting), tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["vsd"] > 0


def test_it_is_tried_after_resuming_too(settings):
    config = TrainConfig(**settings, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(3)])
    trainer = make_trainer(config, RunFolder(config).checkpoints)
    without_backward(trainer.teacher.model.model.language_model)
    with pytest.raises(CachekdError, match="L_VSD has no gradient"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


# ---- nothing changes by it

NUMBERS = ("loss", "grad_norm", *TERMS)
CASES: dict[str, dict] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"batch_size": 2, "gradient_accumulation": 2},
    "chunks": {"logit_chunk": 1},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.3}},
    "live": {"cache": None, "live_teacher": True},
    "bridge": {"switch_bridge": "linear"},
    "projector": {"stage": "dpt"},
    "ce": {"stage": "sft"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_a_run_without_it(settings, tmp_path, monkeypatch, case):
    """LoRA draws dropout at every step, so that a random number more would show."""
    if case == "lora":
        pytest.importorskip("peft")
    if case == "bridge":
        settings["student"] = str(save_vlm(tmp_path / "wide", tiny_processor(), vision_width=64))
    with_it = TrainConfig(**settings | CASES[case])
    train(with_it)
    monkeypatch.setattr("cachekd.train.reach.prove_gradients", lambda _: None)
    without = with_it.model_copy(update={"out": settings["out"].with_name("without")})
    train(without)
    logs = [json.loads((each.out / RUN_FILE).read_text())["log"] for each in (with_it, without)]
    with_its, withouts = ([[entry.get(name) for name in NUMBERS] for entry in log] for log in logs)
    assert len(with_its) >= 6
    assert with_its == withouts
    ours, theirs = (load_file(config.out / "model.safetensors") for config in (with_it, without))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_all_is_as_before(settings, tmp_path):
    trainer = make_trainer(TrainConfig(**settings), tmp_path)
    modes = [module.training for module in trainer.vlm.modules()]
    state = torch.get_rng_state()
    prove_gradients(trainer)
    assert [module.training for module in trainer.vlm.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainer.vlm.parameters())


# ---- zeros that are none


def test_a_student_that_is_its_teacher_is_no_fault(settings, tmp_path):
    """L_Align and L_VSD are at their minimum."""
    same = {"student": settings["teacher"], "cache": None, "live_teacher": True}
    trainer = make_trainer(TrainConfig(**settings | same), tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["align"] == pytest.approx(0, abs=1e-6)


def test_a_projector_that_is_zero_at_first_is_no_fault(settings, student_path, tmp_path):
    """No gradient passes it in the first step, and then it is zero no more."""
    folder = shutil.copytree(student_path, tmp_path / "zero")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("projector.linear_2.weight"))
    weights[name] = torch.zeros_like(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    train(TrainConfig(**settings | {"student": str(folder)}))
    assert len(losses(settings["out"])) == 6


def test_samples_of_text_alone_are_no_fault(settings, tmp_path, caplog):
    """One with a picture is looked for; without any the switched path is not tried, and it is said."""
    trainer = make_trainer(TrainConfig(**settings), tmp_path)
    pictures = [example for example in trainer.train_dataset if "pixel_values" in example.encoded.inputs]
    assert pictures
    first = pictures[0]
    text = {n: x for n, x in first.encoded.inputs.items() if n != "pixel_values"}
    text["input_ids"] = torch.where(text["input_ids"] == 1, 7, text["input_ids"])
    alone = Example(replace(first.encoded, inputs=text), first.targets)
    trainer.feed.first = alone
    prove_gradients(trainer)
    assert not caplog.messages
    trainer.train_dataset = [alone] * 3
    prove_gradients(trainer)
    assert caplog.messages == ["the gradient of L_VSD was not tried: no sample was found for it"]
