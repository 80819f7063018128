"""Quantised weights, by every backend that is installed: the others' tests are skipped, and say so."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from cachekd.data import SampleEncoder, collate
from cachekd.data.collate import ModelInputs
from cachekd.data.sample import Sample
from cachekd.errors import CachekdError
from cachekd.models import (
    DeferredHead,
    ModelFiles,
    SwitchedTeacher,
    encode,
    hidden_and_logits_at,
    output_head,
    vocabulary_of,
)
from cachekd.models.families import vision_tower_name
from cachekd.models.quantization import BACKENDS, quantization_config
from cachekd.models.split import logits_at
from tiny import noise_image, save_vlm, tiny_processor
from tiny_families import FAMILIES, build

CPU = torch.device("cpu")
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
# By the package that each needs.
SETTINGS = {
    "nf4": ("bitsandbytes", "4bit"),
    "fp4": ("bitsandbytes", FP4),
    "int8": ("bitsandbytes", "8bit"),
    "torchao int8": ("torchao", {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}),
    "torchao fp8": ("torchao", {"quant_method": "torchao", "quant_type": "Float8WeightOnlyConfig"}),
    "quanto int8": ("optimum-quanto", {"quant_method": "quanto", "weights": "int8"}),
    "quanto fp8": ("optimum-quanto", {"quant_method": "quanto", "weights": "float8"}),
}


def there(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def needs(name: str) -> object:
    package, setting = SETTINGS[name]
    missing = pytest.mark.skipif(not there(package), reason=f"{package} is not installed")
    return pytest.param(setting, id=name, marks=missing)


EVERY = [needs(name) for name in SETTINGS]
needs_bitsandbytes = pytest.mark.skipif(not there("bitsandbytes"), reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("q") / "teacher", tiny_processor(), text_width=64, seed=1)


@pytest.fixture(scope="module")
def batch(teacher) -> ModelInputs:
    encoder: SampleEncoder = ModelFiles(teacher).encoder
    messages = tuple(
        {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
        for turn in [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red yes"}]
    )
    with_image = ({"role": "user", "content": [{"type": "image"}, *messages[0]["content"]]}, messages[1])
    sample = Sample("a", (noise_image(1),), with_image, "a test")
    return ModelInputs.of(collate([encoder(sample)], encoder.pad_token_id))


def loaded(teacher: Path, setting: object):
    files = ModelFiles(teacher)
    return files.load(dtype=torch.float32, device=CPU, quantization=setting)


def gradient_at_vision(teacher: Path, setting: object, batch: ModelInputs) -> torch.Tensor:
    """Of the switched path's logits, at a weight of the student's vision encoder (here a plain teacher's)."""
    student = loaded(teacher, None)
    switched = SwitchedTeacher(loaded(teacher, setting))
    head = switched.head(batch.tensors, batch.positions)  # a forward without gradient, as in training
    vision = encode(student, batch.tensors)
    states = head.states(lambda: switched.logits(vision, batch.tensors, batch.positions))
    logits = head.logits(states)
    (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    gradient = student.model.vision_tower.embeddings.patch_embedding.weight.grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("setting", EVERY)
def test_the_gradient_of_the_switched_path_is_about_the_plain_teachers(teacher, batch, setting):
    plain, quantised = (gradient_at_vision(teacher, each, batch) for each in (None, setting))
    assert torch.nn.functional.cosine_similarity(plain.flatten(), quantised.flatten(), dim=0) > 0.9
    assert 0.8 < float(quantised.norm() / plain.norm()) < 1.25


def test_head_and_vision_encoder_stay_whole_whatever_a_mapping_skips(teacher):
    if not there("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    skip = {"load_in_4bit": True, "llm_int8_skip_modules": ["model.language_model.layers.0"]}
    for setting in ("4bit", skip):
        model = loaded(teacher, setting)
        packed = {name for name, x in model.named_modules() if type(x).__name__ == "Linear4bit"}
        assert packed
        assert not any(name.startswith(("model.vision_tower", "lm_head")) for name in packed)
        assert any(name.startswith("model.language_model.layers.0") for name in packed) == (setting == "4bit")


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
def test_the_vision_encoder_of_every_family_stays_whole(family):
    model = build(family)
    kept = quantization_config("4bit", model).llm_int8_skip_modules
    assert sorted(kept) == ["lm_head", f"model.{vision_tower_name(model.config)}"]


@needs_bitsandbytes
def test_a_checkpoint_that_is_quantised_is_loaded_as_it_is(teacher, batch, tmp_path):
    whole = loaded(teacher, "4bit")
    whole.save_pretrained(tmp_path / "saved")
    ModelFiles(teacher).processor.save_pretrained(tmp_path / "saved")
    files = ModelFiles(tmp_path / "saved")
    model = files.load(dtype=torch.float32, device=CPU)
    for each in (whole, model):
        each.requires_grad_(False)
    assert torch.equal(*(logits_at(each, batch.tensors, batch.positions) for each in (whole, model)))
    info = files.quantization(None, torch.float32)
    assert info.backend == "bitsandbytes"
    assert info.in_checkpoint
    assert info.setting is None
    assert files.config_sha256 != ModelFiles(teacher).config_sha256  # it stands in the checkpoint
    without_tower = files.load(dtype=torch.float32, device=CPU, tower=False)
    assert type(without_tower.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with pytest.raises(CachekdError, match="the checkpoint is quantised already"):
        files.load(dtype=torch.float32, device=CPU, quantization="4bit")


@needs_bitsandbytes
def test_a_packed_head_is_the_matrix_that_it_stands_for(teacher, batch):
    """Of a checkpoint whose maker quantised it too; its weights have no V rows."""
    import bitsandbytes

    model = loaded(teacher, None).requires_grad_(False)
    plain = model.lm_head
    packed = bitsandbytes.nn.Linear4bit(64, plain.out_features, bias=False, quant_type="nf4")
    packed.load_state_dict({"weight": plain.weight})
    packed.to(CPU)
    packed.weight = packed.weight.to(CPU)
    packed.support_avx512bf16_for_cpu = False
    model.set_output_embeddings(packed.eval())
    assert packed.weight.shape[0] != plain.out_features
    tokenizer = ModelFiles(teacher).processor.tokenizer
    assert vocabulary_of(model, tokenizer) == len(tokenizer)
    hidden, logits = hidden_and_logits_at(model, batch.tensors, batch.positions)
    head = output_head(model, hidden, logits, len(tokenizer))
    assert head.weight.shape == (len(tokenizer), 64)
    torch.testing.assert_close(head.logits(hidden), logits[:, : len(tokenizer)], atol=1e-4, rtol=1e-4)
    assert DeferredHead(model, batch.tensors, batch.positions).reason is None


# ---- what is said of it


@needs_bitsandbytes
def test_a_preset_and_its_mapping_are_the_same(teacher):
    files = ModelFiles(teacher)
    mapping = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    preset = files.quantization("4bit", torch.bfloat16)
    assert preset == files.quantization(mapping, torch.bfloat16) == files.quantization("4bit", torch.float32)
    assert preset.version == version("bitsandbytes")
    assert preset == files.quantization(preset.setting, torch.bfloat16)
    assert preset != files.quantization(mapping | {"bnb_4bit_compute_dtype": "float16"}, torch.bfloat16)
    assert preset != files.quantization("8bit", torch.bfloat16)
    assert files.quantization(None, torch.bfloat16) is None
    assert files.config_sha256 == ModelFiles(teacher).config_sha256


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"quant_method": "magic"}, "there is no such quantisation"),
        ({"bits": 4}, "no quantisation is named"),
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "unknown: bnb_4bit_quant_typ; known: bnb_4bit"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "floaty"}, "bitsandbytes has no quantisation"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting, said):
    if "load_in_4bit" in setting and not there("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    with pytest.raises(CachekdError, match=said):
        quantization_config(setting)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(BACKENDS, "quanto", BACKENDS["quanto"]._replace(package="no-such-package"))
    with pytest.raises(CachekdError) as caught:
        quantization_config({"quant_method": "quanto", "weights": "int8"})
    assert caught.value.fix.startswith("pip install no-such-package")
