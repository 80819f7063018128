"""What the scenarios of `tests/device` ask of a device: how near it has to come to the CPU, and what else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

import second_device
from cachekd.cache import targets
from cachekd.losses import kneedle

GPU_LOSS = 1e-3  # the share by which a loss may differ between CPU and GPU, in float32


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within, the CPU is the default device; it computes as another does: attention without kernels of its
    own, and leading logits with their padding."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        for module in (kneedle, targets):
            patch.setattr(module, "widest", lambda k, width: width)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
        yield


class Waits:
    """How often the CPU waited for the device."""

    count = 0


@dataclass(frozen=True)
class SecondDevice:
    """`second_device`: what it computes is what the CPU computes."""

    device: torch.device
    exact: bool = True

    def assert_close(self, ours: Any, cpus: Any, share: float = 0.0) -> None:
        """The same numbers, in the same tuples or dictionaries; but for `share`, where it is said."""
        torch.testing.assert_close(_there(ours), _there(cpus), rtol=share, atol=share / 10)

    @contextmanager
    def no_memory(self) -> Iterator[None]:
        with second_device.no_memory():
            yield

    @contextmanager
    def counted_waits(self) -> Iterator[Waits]:
        before, waits = second_device.waits(), Waits()
        yield waits
        waits.count = second_device.waits() - before


@dataclass(frozen=True)
class RealDevice:
    """A GPU, whose kernels round otherwise."""

    device: torch.device
    exact: bool = False

    def assert_close(self, ours: Any, cpus: Any, share: float = GPU_LOSS) -> None:
        """Tensors that are a share of their length, numbers that are a share, apart at the most."""
        ours, cpus = (tree_leaves(_there(values)) for values in (ours, cpus))
        for one, other in zip(ours, cpus, strict=True):
            one, other = (torch.as_tensor(x, dtype=torch.float64) for x in (one, other))
            off, length = float((one - other).norm()), float(other.norm())
            assert off <= share * length + 1e-4, f"{off:g} of {length:g} apart"

    @contextmanager
    def no_memory(self) -> Iterator[None]:
        """All of what the allocator has is in use, and it gets no more."""
        cuda = torch.cuda
        cuda.empty_cache()
        total = cuda.mem_get_info()[1]
        cuda.set_per_process_memory_fraction(max(cuda.memory_reserved(), 1) / total)
        ballast = []
        for size in (2**20, 2**16, 2**12, 2**9):
            with suppress(torch.OutOfMemoryError):
                while len(ballast) < 2**16:
                    ballast.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        try:
            yield
        finally:
            cuda.set_per_process_memory_fraction(1.0)

    @contextmanager
    def counted_waits(self) -> Iterator[Waits]:
        waits = Waits()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.count = sum("synchronizing CUDA operation" in str(one.message) for one in caught)


def _there(values: Any) -> Any:
    """On the CPU."""
    return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, values)
