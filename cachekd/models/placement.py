"""Where a model's layers lie: on GPUs, in the CPU's memory, on the disk; by accelerate's dispatch.

Layers alone may lie off the devices that compute: each is fetched for its turn. All else (embeddings, norms,
projector, head) stays, as the split and the losses call it apart from the model's own forward, where no hook
would fetch it. Layers on the disk are read from the checkpoint's own safetensors files: nothing is written.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

log = logging.getLogger(__name__)

Place = int | str  # a GPU's number, or "cpu", "disk", "mps"


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs. (`model.device` is that of any weight, which may be on the disk.)"""
    return model.get_input_embeddings().weight.device


def output_device(model: PreTrainedModel) -> torch.device:
    """Where its head is, and so its logits."""
    return model.get_output_embeddings().weight.device


def is_placed(model: nn.Module) -> bool:
    """Whether a device map says where it lies, which need not be where the batches are."""
    return hasattr(model, "hf_device_map")


def is_dispatched(model: nn.Module) -> bool:
    """Whether hooks move its layers or what they read."""
    return hasattr(model, "_hf_hook")


def is_offloaded(model: nn.Module) -> bool:
    """Whether some layers are fetched for each forward."""
    return any(parameter.is_meta for parameter in model.parameters())


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers of encoder and language model, by their names: what is moved as one piece."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }


@contextmanager
def quietly() -> Iterator[None]:
    """Without what accelerate says of maps that are as they ought to be: weights outside of modules have a
    line of their own, and what is offloaded is offloaded."""
    theirs = logging.getLogger("accelerate.big_modeling")
    level = theirs.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following device_map keys do not match")
        theirs.setLevel(logging.ERROR)
        try:
            yield
        finally:
            theirs.setLevel(level)


def settle(model: PreTrainedModel) -> None:
    """Make the hooks of a dispatched model leave logits where its head is, and the mask of the places where
    logits are wanted on the CPU, from where it can index states on any device."""
    if not is_dispatched(model):
        return
    hook: Any = model._hf_hook
    for one in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
        if isinstance(one, AlignDevicesHook):
            theirs = one.skip_keys or []
            one.skip_keys = [*([theirs] if isinstance(theirs, str) else theirs), "logits_to_keep"]
            one.io_same_device = False
            one.execution_device = input_device(model)  # accelerate takes the first of all
    said = model.hf_device_map
    places = Counter(said[longest_prefix(name, said) or ""] for name in layers_of(model))
    log.warning("layers of %s: %s", model.config.name_or_path, told(places))


def told(places: Mapping[Place, int]) -> str:
    """Say how many layers lie where."""
    names = {"cpu": "in the CPU's memory", "disk": "on the disk"}
    return ", ".join(f"{count} {names.get(str(key), f'on GPU {key}')}" for key, count in places.items())


def longest_prefix(name: str, prefixes: Iterable[str]) -> str | None:
    """The longest of these names that a module or tensor is in, or is."""
    inside = [one for one in prefixes if not one or f"{name}.".startswith(f"{one}.")]
    return max(inside, key=len, default=None)
