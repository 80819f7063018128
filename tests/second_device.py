"""A second device without a GPU: its tensors say that they are on `gpu`, are computed on the CPU, and refuse
to meet tensors that are elsewhere.

Whoever gets the CPU's bits on it has moved everything to where it belongs. It says nothing of streams, of
page-locked memory, or of a GPU's own kernels and their rounding: those are for `pytest -m gpu`.

Beside `gpu:0`, the default, there are `gpu:1` and `gpu:2`, for models that are split over several devices. A
backend in Python can have one device for autograd, so the index is kept beside the tensor. What autograd
makes by itself is on `gpu:0`, which therefore may meet the other two; these may not meet each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration as registration
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

NAME, DEVICES = "gpu", 3
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}  # what may have tensors of two devices


class SecondTensor(Tensor):
    """A tensor on `gpu:index`.

    Attributes:
        held: the same on the CPU.
    """

    held: Tensor
    index: int

    @staticmethod
    def __new__(cls, held: Tensor, index: int) -> SecondTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held, made.index = held, index
        return made

    def __init__(self, held: Tensor, index: int) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, self.index)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Between two of these devices the index changes, of which torch knows nothing."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        names = {name: value for name, value in kwargs.items() if name not in ("copy", "memory_format")}
        device, dtype, *_ = torch._C._nn._parse_to(*args, **names)
        if device is not None and device.type == NAME and self.index != (device.index or 0):
            moved = _Moved.apply(self, device.index or 0)
            return moved if dtype is None else moved.to(dtype)
        moved = super().to(*args, **kwargs)
        same = moved.device == self.device and moved.dtype == self.dtype and not kwargs.get("copy")
        return self if same else moved  # it may be a parameter

    def untyped_storage(self) -> Any:
        """Whoever saves asks it which tensors share their memory."""
        return self.held.untyped_storage()

    def storage(self) -> Any:
        return self.held.storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"{self.device} {self.held!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file has a tensor of the CPU."""
        return self.held.__reduce_ex__(protocol)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: SecondTensor, index: int) -> Tensor:
        ctx.index = tensor.index
        return SecondTensor(tensor.held.clone(), index)

    @staticmethod
    def backward(ctx: Any, gradient: SecondTensor) -> tuple[Tensor, None]:
        return SecondTensor(gradient.held.clone(), ctx.index), None


class _State:
    """Of the device, for tests to ask and to set."""

    available = False
    full = False
    waits = 0


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on tensors of ours, or one that makes some."""
    name = op._schema.name
    leaves = tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, SecondTensor)]
    if name not in _COPIES:
        _refuse_mixed(op, leaves)
    index = max((one.index for one in ours if one.dim()), default=ours[0].index if ours else 0)
    there = bool(ours)
    if kwargs.get("device") is not None:
        target = torch.device(kwargs["device"])
        there, index = target.type == NAME, target.index or index
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    if there and _State.full:
        raise torch.OutOfMemoryError("CUDA out of memory")
    _State.waits += bool(ours) and (not there or _waits(name, args))
    try:
        made = op(*tree_map(_held, args), **tree_map(_held, kwargs))
    except IndexError as error:
        if "out of range" not in str(error):
            raise
        # A GPU does not look before: it is an assertion that fails there.
        raise torch.AcceleratorError("CUDA error: device-side assert triggered") from error
    if not op._schema.returns:  # some change all that they are given
        return None
    if name.endswith("_") or "out" in kwargs:
        return kwargs.get("out", args[0])
    return tree_map(lambda x: SecondTensor(x, index) if isinstance(x, Tensor) else x, made) if there else made


def _waits(name: str, args: Any) -> bool:
    """Whether the CPU has to know a result: a number, or how many there are."""
    indexed = name.startswith("aten::index") and any(
        isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2])
    )
    return indexed or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, SecondTensor) else leaf


def _refuse_mixed(op: Any, leaves: list[Any]) -> None:
    """As CUDA does: scalars may come from the CPU, and so may what indexes."""
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
    if op._schema.name.startswith("aten::index"):
        devices.discard(torch.device("cpu"))
    if len(devices) > 1:
        devices.discard(torch.device(NAME, 0) if torch.device("cpu") not in devices else None)
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {found}! ({op})"
        )


class _Module(registration._DummyBackendModule):
    """`torch.gpu`."""

    def is_available(self) -> bool:
        return _State.available

    def device_count(self) -> int:
        return DEVICES

    def set_device(self, device: Any) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        """Nothing: all numbers come from the CPU's generator."""
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


class _Hook(registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _State.available


@cache
def register() -> torch.library.Library:
    """Torch knows of the device from here on; it is not available yet.

    To be called before the first backward of the process, which makes autograd's threads, and not where there
    is a GPU, before which it would come.
    """
    registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")
    return library


class _MadeThere(TorchFunctionMode):
    """Tensors from nothing are made on the CPU and moved: torch makes some of them by resizing an empty one,
    which a wrapper does not see."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if function in _device_constructors() and device is not None and torch.device(device).type == NAME:
            args = tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, SecondTensor) else leaf, args)
            learns = kwargs.pop("requires_grad", False)
            return function(*args, **kwargs | {"device": "cpu"}).to(device).requires_grad_(learns)
        return function(*args, **kwargs)


@contextmanager
def no_memory() -> Iterator[None]:
    """Within, nothing more can be made on the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_State, "full", True)
        yield


def waits() -> int:
    """How often the CPU would have waited for the device until now."""
    return _State.waits


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within, `default_device()` is `gpu:0`, and accelerate's device too."""
    register()
    with pytest.MonkeyPatch.context() as patch, _MadeThere():
        patch.setattr(_State, "available", True)
        patch.delenv("ACCELERATE_USE_CPU", raising=False)
        patch.setenv("ACCELERATE_TORCH_DEVICE", f"{NAME}:0")
        patch.setattr(torch._C, "_InferenceMode", lambda _: torch.no_grad())  # its tensors cannot be wrapped
        patch.setattr(Tensor, "pin_memory", lambda self, device=None: self.clone())
        # A module's parameters stay the same objects on another device, and so tied ones stay tied.
        swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            yield torch.device(NAME, 0)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
