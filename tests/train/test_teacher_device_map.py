"""A teacher that does not fit beside the student: layers on the disk, the same losses."""

from __future__ import annotations

import pytest
import torch

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.models import load_model
from cachekd.models.placement import is_offloaded, layers_of
from cachekd.paths import RUN_FILE
from cachekd.train import open as train_open
from cachekd.train import train
from cachekd.train.estimate import estimate_training
from placements import just_enough, layers_on_disk
from runs import losses


@pytest.fixture
def teachers(monkeypatch) -> list:
    """The teachers of the runs."""
    found, load = [], train_open.load_teacher
    monkeypatch.setattr(train_open, "load_teacher", lambda *args: found.append(load(*args)) or found[-1])
    return found


@pytest.mark.parametrize("live", [False, True], ids=["cached", "live"])
def test_layers_on_the_disk_change_no_bit_of_a_run(settings, tmp_path, teachers, live):
    settings |= {"gradient_checkpointing": True, "epochs": 1}
    if live:
        settings |= {"live_teacher": True, "cache": None}
    whole = load_model(settings["teacher"], dtype=torch.float32, device=torch.device("cpu"), tower=live)
    on_disk = layers_on_disk(tmp_path, whole)
    train(TrainConfig(**settings))
    train(TrainConfig(**settings | {"out": tmp_path / "split", "teacher_device_map": on_disk}))
    assert [is_offloaded(teacher.model) for teacher in teachers] == [False, True]
    assert losses(tmp_path / "split") == losses(settings["out"])
    student = "model.safetensors"
    assert (tmp_path / "split" / student).read_bytes() == (settings["out"] / student).read_bytes()
    # Nothing of what was fetched stays.
    layers = layers_of(teachers[1].model).values()
    assert all(weight.is_meta for layer in layers for weight in layer.parameters())


def test_by_memory_alone_and_only_with_recomputed_layers(settings, teachers):
    whole = load_model(settings["teacher"], dtype=torch.float32, device=torch.device("cpu"), tower=False)
    # Of its two layers there is room for one, which is fetched.
    settings |= {"teacher_max_memory": f"cpu={just_enough(whole) - 1000}B", "epochs": 1}
    with pytest.raises(CachekdError, match="needs gradient checkpointing") as caught:
        train(TrainConfig(**settings))
    assert "--gradient-checkpointing" in str(caught.value)
    assert not settings["out"].exists()
    estimate = estimate_training(TrainConfig(**settings, gradient_checkpointing=True))
    assert 0 < estimate.memory["teacher"] < 4 * estimate.teacher_parameters
    train(TrainConfig(**settings, gradient_checkpointing=True))
    assert (settings["out"] / RUN_FILE).exists()
    assert is_offloaded(teachers[-1].model)
