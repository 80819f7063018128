"""A teacher that is split over two devices: the bits of one, and no tensor that meets one of the other.

Of the devices of `second_device` the teacher has `gpu:1` and `gpu:2`, and a student `gpu:0`.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cachekd.config import DumpConfig, TrainConfig
from cachekd.data import collate
from cachekd.data.collate import ModelInputs
from cachekd.dump import dump
from cachekd.models import DeferredHead, hidden_and_logits_at, load_model, logits_at
from cachekd.models.placement import layers_of
from cachekd.train import train
from caches import files_of
from family_samples import TALL, WIDE, encoder_of, every_family
from placements import map_file
from runs import losses
from second_device import register, second_device
from tiny_families import save

CPU = torch.device("cpu")
register()


def alternating(folder, model):
    """Every second layer on `gpu:1`, all else on `gpu:2`."""
    return map_file(folder, {"": 2} | dict.fromkeys(list(layers_of(model))[::2], 1))


@every_family
def test_two_devices_give_the_bits_of_one(family, tmp_path):
    path = save(tmp_path / "teacher", family)
    encoder = encoder_of(family)
    batch = ModelInputs.of(collate([encoder(WIDE), encoder(TALL)], encoder.pad_token_id))
    whole = load_model(str(path), dtype=torch.float32, device=CPU)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = hidden_and_logits_at(whole, batch.tensors, batch.positions)
    with second_device() as device, torch.no_grad():
        places = alternating(tmp_path, whole)
        model = load_model(str(path), dtype=torch.float32, device=device, device_map=places)
        assert len({p.device for p in model.parameters()}) == 2
        found = hidden_and_logits_at(model, batch.tensors, batch.positions)
        assert {x.device for x in found} == {torch.device("gpu", 2)}
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
        head = DeferredHead(model, batch.tensors, batch.positions)
        assert head.reason is None
        states = head.states(lambda: logits_at(model, batch.tensors, batch.positions))
        assert torch.equal(head.logits(states).cpu(), expected[1])


def test_a_dump_over_two_devices_has_the_bytes_of_the_cpu(tmp_path, teacher_path, data_path):
    settings = {"teacher": str(teacher_path), "data": str(data_path), "batch_size": 4}
    with sdpa_kernel(SDPBackend.MATH):
        dump(DumpConfig(**settings, out=tmp_path / "cpu"))
    whole = load_model(str(teacher_path), dtype=torch.float32, device=CPU)
    places = alternating(tmp_path, whole)
    with second_device():
        dump(DumpConfig(**settings, dtype="float32", out=tmp_path / "two", device_map=places))
    assert files_of(tmp_path / "two") == files_of(tmp_path / "cpu")


@pytest.mark.parametrize("live", [False, True], ids=["cached", "live"])
def test_a_teacher_on_another_device_than_the_student(tmp_path, settings, live):
    settings |= {
        "dtype": "float32",
        "epochs": 1,
        "workers": 0,
        "live_teacher": live,
        "cache": None if live else settings["cache"],
    }
    apart = {"out": tmp_path / "apart", "teacher_device_map": map_file(tmp_path, {"": 1})}
    with second_device():
        train(TrainConfig(**settings))
        train(TrainConfig(**settings | apart))
    assert losses(tmp_path / "apart") == losses(settings["out"])
