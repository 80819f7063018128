"""The second device refuses what a GPU refuses; else what runs on it would prove nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cachekd.models import default_device
from cachekd.models.device import accelerator
from devices import on_cpu
from second_device import second_device


def test_it_is_the_default_device_where_it_is_asked_for():
    assert accelerator() is None
    with second_device() as device:
        assert default_device() == device == torch.device("gpu", 0)
        with on_cpu():
            assert default_device() == torch.device("cpu")
    assert default_device() == torch.device("cpu")


def test_tensors_of_two_devices_do_not_mix():
    ours, cpus = torch.ones(3), torch.ones(3)
    with second_device():
        first, second = ours.to("gpu:1"), ours.to("gpu:2")
        assert torch.equal((first + 1).cpu(), cpus + 1)
        for one, other in ((first, cpus), (cpus, first), (first, second)):
            with pytest.raises(RuntimeError, match="found at least two devices"):
                one + other
        assert torch.equal((first + torch.tensor(2.0)).cpu(), cpus + 2)  # a scalar may come from anywhere
        assert first[torch.tensor([0, 2])].device == torch.device("gpu", 1)  # and so may an index


def test_gradients_come_back_over_two_devices():
    with second_device():
        x = torch.ones(3, device="gpu:1", requires_grad=True)
        y = (2 * x).to("gpu:2") * torch.full((3,), 3.0, device="gpu:2")
        y.cpu().sum().backward()
        assert x.grad.tolist() == [6.0, 6.0, 6.0]
        assert x.grad.device == torch.device("gpu", 1)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with second_device() as device:
        model.to(device)
        assert model[1].weight is model[0].weight
        assert model[0].weight.device == device


def test_an_index_beyond_a_table_is_an_assertion_of_the_device():
    with second_device() as device, pytest.raises(torch.AcceleratorError, match="device-side assert"):
        nn.Embedding(4, 2).to(device)(torch.tensor([4], device=device))
