"""Models on tensors without memory, and a count of what would have some."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel


def fill(model: PreTrainedModel) -> None:
    """Give a model of `empty_model` tensors that say that they are on the CPU; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_weight else new
                tensors[name] = made[id(tensor)]


def recompute(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.23 renamed it
        model.activation_checkpointing_enable(how)
    else:
        model.gradient_checkpointing_enable(how)


def _has_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation is on whole numbers that are there: sizes of pictures, masks, token ids."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if tensors:
        return not any(isinstance(tensor, FakeTensor) or tensor.is_floating_point() for tensor in tensors)
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point
    return func.overloadpacket is torch.ops.aten.arange and not any(isinstance(x, float) for x in args)


def _places(index: Any) -> tuple[Any, ...]:
    """A mask that is there, as the numbers of its places: how many they are is known then."""
    if not isinstance(index, Tensor) or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that there are, but for those of a model.

    Attributes:
        now, most: bytes, now and at the most.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._there = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.eq.Scalar and isinstance(args[0], FakeTensor):
            # Idefics3 leaves out pictures whose pixels are all zero. Here none are: no pixel is that number.
            with unset_fake_temporarily():
                return torch.zeros((), dtype=torch.bool).expand(args[0].shape)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in _places(index)])
        if _has_values(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if (name := storage._cdata) in self._there:
            return
        size = storage.nbytes()
        self._there.add(name)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, name, size)

    def _forget(self, name: int, size: int) -> None:
        self._there.discard(name)
        self.now -= size
