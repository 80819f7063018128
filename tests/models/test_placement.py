"""A teacher whose layers lie in several places: the same numbers, and what cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cachekd.data import collate
from cachekd.data.collate import ModelInputs
from cachekd.errors import CachekdError
from cachekd.models import (
    SwitchedTeacher,
    capture_vision,
    default_device,
    device_map,
    hidden_and_logits_at,
    load_model,
)
from cachekd.models.families import vision_tower
from cachekd.models.placement import is_dispatched, is_offloaded, layers_of
from cachekd.train.teacher import recompute_frozen_layers
from family_samples import TALL, WIDE, encoder_of, every_family
from placements import just_enough, layers_on_disk, map_file
from tiny_families import build, save

CPU = torch.device("cpu")


def loaded(path: Path, device: torch.device = CPU, **settings: Any) -> Any:
    return load_model(str(path), dtype=torch.float32, device=device, **settings)


def batch_of(family: str) -> ModelInputs:
    encoder = encoder_of(family)
    return ModelInputs.of(collate([encoder(WIDE), encoder(TALL)], encoder.pad_token_id))


@every_family
def test_layers_on_the_disk_give_the_same_bits(family, tmp_path):
    path, batch = save(tmp_path / "teacher", family), batch_of(family)
    whole = loaded(path)
    on_disk = layers_on_disk(tmp_path, whole)
    enough = {"cpu": just_enough(whole)}
    with torch.inference_mode():
        expected = hidden_and_logits_at(whole, batch.tensors, batch.positions)
        for settings in ({"device_map": on_disk}, {"device_map": "auto", "max_memory": enough}):
            model = loaded(path, **settings)
            fetched = [name for name, layer in layers_of(model).items() if is_offloaded(layer)]
            assert fetched or family == "fast_vlm"  # two layers in all: both are kept
            assert len(fetched) < len(layers_of(model)) or "max_memory" not in settings
            found = hidden_and_logits_at(model, batch.tensors, batch.positions)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def switched_gradient(teacher: Any, family: str, batch: ModelInputs) -> tuple[Tensor, Tensor]:
    """Logits of the switched path, by its own head, and their gradient at V_S."""
    student = build(family, seed=2).to(batch.supervised.device)
    with capture_vision(student) as vision:
        student(**batch.tensors)
    assert vision.output is not None
    switch = SwitchedTeacher(teacher)
    recompute_frozen_layers(switch.model)
    head = switch.head(batch.tensors, batch.positions)
    states = head.states(lambda: switch.logits(vision.output, batch.tensors, batch.positions))
    logits = head.logits(states)
    logits.square().mean().backward()
    gradients = [x.grad.flatten() for x in vision_tower(student).parameters() if x.grad is not None]
    return logits.detach(), torch.cat(gradients)


@every_family
def test_the_switched_path_through_layers_on_the_disk_has_the_same_gradient(family, tmp_path):
    path, batch = save(tmp_path / "teacher", family, text_width=24, seed=1), batch_of(family)
    whole = loaded(path, tower=False)
    on_disk = layers_on_disk(tmp_path, whole)
    split = loaded(path, tower=False, device_map=on_disk)
    assert is_offloaded(split)
    expected, found = (switched_gradient(model, family, batch) for model in (whole, split))
    assert expected[1].any()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Nothing that was fetched stays: of each layer every weight is back on the disk.
    assert all(weight.is_meta for layer in layers_of(split).values() for weight in layer.parameters())


def test_one_file_goes_for_a_dump_and_for_the_teacher_of_a_training(tmp_path):
    """Which has no vision encoder."""
    path = save(tmp_path / "teacher", "qwen2_vl")
    both = layers_on_disk(tmp_path, loaded(path))
    assert is_offloaded(loaded(path, device_map=both))
    switched = loaded(path, tower=False, device_map=both)
    assert all(is_offloaded(layer) for layer in layers_of(switched).values())


@pytest.mark.parametrize(
    ("processes", "alone"),
    [
        ({}, True),
        ({"LOCAL_WORLD_SIZE": "1"}, True),
        ({"LOCAL_WORLD_SIZE": "2"}, False),
        ({"SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}, False),
    ],
)
def test_of_several_processes_each_keeps_to_its_own_gpu(monkeypatch, processes, alone):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in processes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device_map, "get_max_memory", lambda: {0: 100, 1: 100, "cpu": 1000})
    assert device_map._room(1, {}) == ({0: 90} if alone else {}) | {1: 90, "cpu": 900}


@pytest.mark.gpu
def test_layers_off_a_gpu_give_its_bits_and_its_gradient(tmp_path):
    """Of three places: layers that stay, that come from the CPU's memory, and from the disk."""
    if (device := default_device()).type == "cpu":
        pytest.skip("there is no GPU")
    path = save(tmp_path / "teacher", "qwen2_vl")
    batch = batch_of("qwen2_vl").to(device)
    whole = loaded(path, device)
    first, second, *others = layers_of(whole)
    places = map_file(tmp_path, {"": 0, first: "cpu", second: 0} | dict.fromkeys(others, "disk"))
    split = loaded(path, device, device_map=places)
    assert is_offloaded(split)
    small = {"0": just_enough(whole)}
    assert is_offloaded(loaded(path, device, device_map="auto", max_memory=small))
    with torch.inference_mode():
        expected, found = (hidden_and_logits_at(m, batch.tensors, batch.positions) for m in (whole, split))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    towerless = loaded(path, device, tower=False)
    on_disk = map_file(tmp_path, {"": 0} | dict.fromkeys(layers_of(towerless), "disk"))
    teachers = towerless, loaded(path, device, tower=False, device_map=on_disk)
    expected, found = (switched_gradient(model, "qwen2_vl", batch) for model in teachers)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(weight.is_meta for layer in layers_of(teachers[1]).values() for weight in layer.parameters())


# ---- what is refused


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(CachekdError) as caught:
        loaded(path, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("places", "problem", "named"),
    [
        (
            {"": "cpu", "model.language_modle": "disk"},
            "names no module",
            "did you mean model.language_model?",
        ),
        ({"": "cpu", "model.language_model.layers.0.mlp": "disk"}, "in one place", "layers.0\n"),
        ({"model.language_model": "cpu"}, "leaves modules out", "vision_tower"),
        ({}, "leaves modules out", "every module"),
        ({"": "disk"}, "only layers", "patch_embedding.weight (the disk)"),
        ({"": "cpu", "lm_head": "disk"}, "only layers", "1 others: lm_head.weight (the disk)"),
        ({"": "cpu", "model.language_model.layers.1": 0}, "no such device", "cpu, disk"),
        ({"": "cuda:1"}, "no such device", "found: 1"),
        ({"": "elsewhere"}, "no such device", "found: elsewhere"),
    ],
)
def test_a_map_that_cannot_be(tmp_path, teacher_path, places, problem, named):
    text = refusal(teacher_path, device_map=map_file(tmp_path, places))
    assert problem in text
    assert named in text
    assert "map.yaml" in text


def test_a_file_that_is_no_map(tmp_path, teacher_path):
    assert "there is no such device map" in refusal(teacher_path, device_map=str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- cpu\n")
    assert "list.yaml" in refusal(teacher_path, device_map=str(tmp_path / "list.yaml"))
    whole = map_file(tmp_path, {"": "cpu"})
    assert not is_dispatched(loaded(teacher_path, device_map=whole))
    assert "leave one of them out" in refusal(teacher_path, device_map=whole, max_memory={"cpu": 10**9})


def test_too_little_memory_anywhere(teacher_path):
    enough = just_enough(loaded(teacher_path))
    text = refusal(teacher_path, device_map="auto", max_memory={"cpu": enough // 2})
    assert "too little memory" in text
    assert f"found: {enough // 2 / 1e6:,.1f} MB" in text
    assert "no such device" in refusal(teacher_path, device_map="auto", max_memory={"0": 10**9})


def test_weights_that_cannot_be_read_layer_by_layer(tmp_path, teacher_path):
    """Nothing is written to the disk for them."""
    model = loaded(teacher_path)
    on_disk = layers_on_disk(tmp_path, model)
    shutil.copytree(teacher_path, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    there = sorted(tmp_path.rglob("*"))
    text = refusal(tmp_path / "pickled", device_map=on_disk)
    assert "save_pretrained" in text
    assert sorted(tmp_path.rglob("*")) == there
    int8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert "quantised" in refusal(teacher_path, device_map=on_disk, quantization=int8)
