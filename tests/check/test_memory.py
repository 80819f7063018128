"""A step's memory, computed from configurations: against what autograd really keeps, and for every family.
(Against a process's peak: `benchmarks/memory_by_part.py`.)"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import yaml
from torch.autograd.graph import saved_tensors_hooks
from typer.testing import CliRunner

from cachekd.check import StepSetting, check_pair, step_memory
from cachekd.config import CheckConfig, TrainConfig
from cachekd.config.fields import PARTS
from cachekd.data import collate
from cachekd.models import ModelFiles, empty_model
from cachekd.models.adapters import with_adapters
from cachekd.models.quantization import stored_bytes
from cachekd_cli.main import app
from family_samples import TEXT, WIDE, encoder_of
from tiny_families import FAMILIES, build, save

ENCODER = encoder_of("llava")
LORA = {"r": 4, "target_modules": "all-linear"}
CPU = torch.device("cpu")


def kept_by_autograd(model, batch) -> int:
    """Bytes of what a forward leaves, but for the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = weakref.ref(storage)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch, logits_to_keep=1, use_cache=False)
    alive = [storage.nbytes() for reference in found.values() if (storage := reference()) is not None]
    assert output.logits.requires_grad  # or all would be gone
    return sum(alive)


def batch_of(sample, size: int) -> dict[str, torch.Tensor]:
    return {name: x for name, x in collate([sample] * size, 0).items() if name != "supervised"}


# Idefics3 and SmolVLM leave out pictures that are all zero, and so look at pixels, which there are none of.
@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm", "internvl", "gemma3"])
def test_activations_are_what_autograd_keeps(family):
    model = build(family, width=64, text_width=64).train()
    if family == "llava":
        model.config.vision_feature_layer = -1  # so that what every layer leaves is wanted
    sample = encoder_of(family)(WIDE)
    found = step_memory(model.config, None, sample, StepSetting(4, None))[False]
    assert found.activations == pytest.approx(kept_by_autograd(model, batch_of(sample, 4)), rel=0.1)
    assert found.teacher == found.switched == 0


@pytest.mark.parametrize("trainable", [PARTS, ("projector", "language_model")], ids=["all", "without V"])
def test_adapters(trainable):
    """In float32 on weights in bfloat16, which have neither gradients nor moments."""
    model, sample = build("llava", width=64, text_width=64), ENCODER(WIDE)
    model.config.vision_feature_layer = -1
    setting = StepSetting(4, torch.bfloat16, torch.bfloat16, lora=LORA, trainable=trainable)
    found = step_memory(model.config, None, sample, setting)[False]
    base = sum(parameter.numel() for parameter in model.parameters())
    model = with_adapters(model.bfloat16(), LORA, trainable).train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in adapters} == {torch.float32}
    count = sum(parameter.numel() for parameter in adapters)
    assert found.weights == 2 * base + 4 * count
    assert (found.gradients, found.optimizer) == (4 * count, 8 * count)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_by_autograd(model, batch_of(sample, 4))
    assert found.activations == pytest.approx(kept, rel=0.1)


def test_adapters_are_made_without_a_warning():
    """peft asks transformers by a name that it gives up; nobody who trains can do anything about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_adapters(build("llava"), {"r": 2, "target_modules": "all-linear"})


def test_a_student_in_bfloat16_and_moments_of_eight_bits():
    model, sample = build("llava", width=64, text_width=64), ENCODER(WIDE)
    own = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    of_float32, of_bfloat16, of_eight_bits = (
        step_memory(model.config, None, sample, StepSetting(1, torch.bfloat16, dtype, optimizer_bytes=bytes_))
        for dtype, bytes_ in ((torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 2))
    )
    for memory in of_bfloat16.values():
        assert (memory.weights, memory.gradients, memory.optimizer) == (2 * own, 2 * own, 8 * own)
    for recomputed, memory in of_eight_bits.items():
        assert memory.optimizer == 2 * own
        assert of_bfloat16[recomputed].peak - memory.peak == 6 * own
        assert memory.activations < of_float32[recomputed].activations  # autocast copies no weights
    # Each step is taken in float32, while what the forward left is gone.
    small = step_memory(model.config, None, ENCODER(TEXT), StepSetting(1, torch.bfloat16, torch.bfloat16))
    assert small[True].peak >= 12 * own + 18 * largest


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_counted_as_it_is_loaded(bits, tmp_path):
    """By bitsandbytes, with and without the vision encoder."""
    pytest.importorskip("bitsandbytes")
    path = save(tmp_path / "model", "smolvlm", width=64, text_width=64)
    files = ModelFiles(path)
    for tower in (True, False):
        loaded = files.load(dtype=torch.bfloat16, device=CPU, tower=tower, quantization=f"{bits}bit")
        found = sum(weight.nbytes for weight in loaded.parameters())
        for module in loaded.modules():  # scales are beside the weights
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            found += 0 if state is None else state.absmax.nbytes
            scales = getattr(getattr(module, "weight", None), "SCB", None)
            found += 0 if scales is None else scales.nbytes
        empty = empty_model(files.config, dtype=torch.bfloat16)
        assert stored_bytes(empty, bits, tower=tower) == found
        assert stored_bytes(empty, tower=tower) > found
    setting = StepSetting(1, torch.bfloat16, teacher_bits=bits)
    sample = encoder_of("smolvlm")(WIDE)
    assert step_memory(files.config, files.config, sample, setting)[False].teacher == found
    off = step_memory(files.config, files.config, sample, replace(setting, switched=False))[False]
    assert off.teacher == off.switched == 0


def test_a_runs_settings_are_read(tmp_path):
    said = {"student": "s", "data": "d", "out": tmp_path, "batch_size": 3, "student_dtype": "bfloat16"}
    said |= {"lora": LORA, "teacher_quantization": "4bit", "student_quantization": {"load_in_8bit": True}}
    said |= {"training": {"optim": "adamw_8bit"}, "lambda_vsd": 0, "trainable": ["projector"]}
    setting = StepSetting.of(TrainConfig(**said), torch.float16)
    assert setting == StepSetting(
        3, torch.float16, torch.bfloat16, LORA, ("projector",), 2, 4, 8, switched=False
    )
    assert str(setting) == (
        "student in bfloat16, student in 8 bits, adapters, projector alone, moments in 8 bits, teacher in 4 "
        "bits, without the switched path"
    )
    plain = {"student": "s", "data": "d", "out": tmp_path}
    assert StepSetting.of(TrainConfig(**plain), None) == StepSetting(16, None)
    by_tokens = TrainConfig(**plain, batch_tokens=1000)
    assert [StepSetting.of(by_tokens, None, tokens).batch_size for tokens in (300, 2000)] == [3, 1]


def test_the_check_computes_as_the_runs_file_has_it(tmp_path, student_path, data_path):
    models = {"teacher": str(student_path), "student": str(student_path), "data": str(data_path)}
    run = {"out": "run", "batch_size": 3, "training": {"optim": "adamw_8bit"}, "lambda_vsd": 0}
    found = check_pair(CheckConfig(**models, **run)).step
    assert (found.batch_size, found.how) == (3, "moments in 8 bits, without the switched path")
    assert found.kept.optimizer == found.kept.weights // 2
    assert found.kept.teacher == 0
    plain = check_pair(CheckConfig(**models)).step
    assert (plain.batch_size, plain.how) == (16, "")
    assert check_pair(CheckConfig(**models, out="cache", tail="none", batch_size=3)).step == plain  # a dump's
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(models | run))
    done = CliRunner().invoke(app, ["check", "--config", str(path)])
    assert "a training step of 3 samples" in done.output
    for wrong, said in (
        ({"lora": {"rank": 4}}, "peft refuses"),
        ({"trainable": ["head"]}, "setting 'trainable"),
    ):
        refused = check_pair(CheckConfig(**models, out="run", **wrong))
        assert refused.step is None
        [row] = (row for row in refused.rows if row.state == "refused")
        assert row.name == "training step"
        assert said in row.text


def test_pixels_without_memory_do():
    """As a caller has them who has no processor: their shape is all that counts."""
    config, sample = build("smolvlm").config, encoder_of("smolvlm")(WIDE)
    inputs = {"input_ids": sample.inputs["input_ids"]}
    inputs["pixel_values"] = torch.empty(sample.inputs["pixel_values"].shape, device="meta")
    setting = StepSetting(2, torch.bfloat16)
    found = step_memory(config, config, replace(sample, inputs=inputs), setting)
    assert found == step_memory(config, config, sample, setting)
    assert found[False].switched > 0


def test_weights_gradients_and_moments_are_counted():
    student, teacher = build("llava", width=32, text_width=32), build("llava", width=32, text_width=48)
    sample = ENCODER(WIDE)
    found = step_memory(student.config, teacher.config, sample, StepSetting(2, torch.bfloat16))
    own = sum(parameter.numel() for parameter in student.parameters())
    tower = sum(parameter.numel() for parameter in teacher.model.vision_tower.parameters())
    theirs = sum(parameter.numel() for parameter in teacher.parameters()) - tower
    for memory in found.values():
        assert (memory.weights, memory.gradients, memory.optimizer) == (4 * own, 4 * own, 8 * own)
        assert memory.teacher == 2 * theirs  # in bfloat16, without its vision encoder
        assert memory.peak >= 12 * own + 2 * theirs + memory.activations
    assert found[True].activations < found[False].activations
    assert found[True].switched < found[False].switched


def test_text_alone_is_not_switched():
    config = build("llava").config
    found = step_memory(config, config, ENCODER(TEXT), StepSetting(2, None))
    assert found[False].switched == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    config = build(family).config
    found = step_memory(config, config, encoder_of(family)(WIDE), StepSetting(2, None))
    assert found
    for memory in found.values():
        assert memory.peak > memory.teacher + 3 * memory.weights
        assert memory.activations > 0
        assert memory.switched > 0
