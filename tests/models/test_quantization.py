"""Quantised weights, by every backend that is installed: the others' tests are skipped, and say so."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from tiny import noise_image, save_vlm, tiny_processor

from cachekd.data import SampleEncoder, collate
from cachekd.data.collate import ModelInputs
from cachekd.data.sample import Sample
from cachekd.models import ModelFiles, SwitchedTeacher, encode

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
