"""Each scenario runs on a second device that is none, bit for bit, and with `-m gpu` on a real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cachekd.models import default_device
from devices import RealDevice, SecondDevice
from second_device import second_device


@pytest.fixture(params=["second", pytest.param("real", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[SecondDevice | RealDevice]:
    """The device that models are on by default."""
    if request.param == "second":
        with second_device() as found:
            yield SecondDevice(found)
    else:
        yield real_device()


@pytest.fixture(scope="session")
def gpu() -> RealDevice:
    return real_device()


def real_device() -> RealDevice:
    if (found := default_device()).type == "cpu":
        pytest.skip("there is no GPU")
    torch.backends.cudnn.allow_tf32 = False  # or its convolutions round to 10 bits
    return RealDevice(found)
