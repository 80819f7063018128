"""Which of a model's modules lies on which device: by the memory that there is, or as a file has it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map
from torch import Tensor, nn

from cachekd.config.base import YamlFile
from cachekd.errors import CachekdError, did_you_mean, megabytes
from cachekd.models.device import accelerator
from cachekd.models.placement import Place, layers_of, longest_prefix

AUTO = "auto"
_FREE = 0.9  # of what is free, unless the user says how much; a batch needs the rest
_SHOWN = 3


def placed(
    skeleton: nn.Module,
    home: torch.device,
    device_map: str,
    max_memory: Mapping[str, int] | None,
    *,
    whole: nn.Module,
    quantised: bool,
) -> dict[str, Any]:
    """Decide where each module lies, before any weights are read.

    Args:
        skeleton: the model without memory ("meta"), in the dtype that it will have.
        home: where what is no layer lies, unless a file says otherwise.
        device_map: "auto", or a file that maps names of modules to devices ("" to all others).
        max_memory: bytes by device, for "auto"; of others 90 % of what is free.
        whole: the model with its vision encoder, whose modules a file may name too; likewise without memory.
        quantised: whether its weights will be; these cannot be fetched for their turn, and transformers alone
            knows their size.

    Returns:
        what transformers' `from_pretrained` takes.

    Raises:
        CachekdError: the file cannot be read, names no module or leaves some out, or puts something where it
            cannot be; or there is too little memory.
    """
    asked = {_key(name): size for name, size in (max_memory or {}).items()}
    for key in asked:
        _require_device(key, "setting 'max_memory'")
    if device_map != AUTO and asked:
        raise CachekdError(
            "a device map from a file places every module, so a limit of memory would have no effect",
            where="settings 'device_map' and 'max_memory'",
            fix="leave one of them out, or --device-map auto",
        )
    if device_map == AUTO and quantised:
        return {"device_map": AUTO, "max_memory": _room(_key(home), asked)}
    if device_map == AUTO:
        layers = _by_memory(skeleton, _key(home), asked)
        where = {
            name: layers.get(longest_prefix(name, layers) or "", _key(home)) for name in _tensors(skeleton)
        }
    else:
        said = by_file(whole, Path(device_map))
        where = {name: said[name] for name in _tensors(skeleton)}
    return {"device_map": _joined(skeleton, where)}


def cannot_lie_there(path: str, found: str) -> CachekdError:
    """What to tell of weights on the disk that no safetensors file holds as they are."""
    return CachekdError(
        "the model's layers cannot lie where the device map or the memory puts them",
        where=path,
        expected="on the disk: weights that are in safetensors files there, as they are",
        found=found,
        fix="more memory for them, so that they stay in it; or model.save_pretrained(NEW_FOLDER)",
    )


def quantised_elsewhere(path: str) -> CachekdError:
    """What to tell of quantised layers that would be fetched."""
    return CachekdError(
        "a quantised model can be spread over GPUs alone",
        where=path,
        expected="every layer on a device that computes",
        found="layers off it, by the device map or for lack of memory",
        fix="leave the device map out, or more memory on the GPUs, or the quantisation out",
    )


def unpacked_as_a_whole(path: str) -> CachekdError:
    """What to tell of a GGUF file."""
    return CachekdError(
        "a GGUF file is unpacked as a whole, and cannot be spread over devices",
        where=path,
        fix="leave the device map out, or save the model in Hugging Face format first",
    )


def _by_memory(skeleton: nn.Module, home: Place, asked: Mapping[Place, int]) -> dict[str, Place]:
    """Each layer's device, in the order of GPUs, CPU and disk, as far as their memory goes."""
    layers, room = layers_of(skeleton), _room(home, asked)
    sizes = {name: _bytes(layer) for name, layer in layers.items()}
    largest = max(sizes.values(), default=0)
    fixed = _bytes(skeleton) - sum(sizes.values())
    if room[home] < fixed + largest:
        raise CachekdError(
            "there is too little memory, even with all other layers elsewhere",
            where=f"the device that computes, {told_place(home)}",
            expected=f"{megabytes(fixed)} for embeddings, head and all else that is no layer, and "
            f"{megabytes(largest)} for one layer at a time",
            found=f"{megabytes(max(0, room[home]))}",
            fix=f"--max-memory {home}=... if more is free, a smaller dtype, or a smaller model",
        )
    if fixed + sum(sizes.values()) + (largest if len(room) > 1 else 0) <= room[home]:
        return {}
    room[home] -= fixed
    # Names with dots are not allowed in a ModuleDict.
    flat = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in layers.items()})
    kinds = list({type(layer).__name__ for layer in layers.values()})
    room = get_balanced_memory(flat, room, kinds)
    found = infer_auto_device_map(flat, room, kinds, clean_result=False)
    return {name: found[name.replace(".", "/")] for name in layers}


def _room(home: Place, asked: Mapping[Place, int]) -> dict[Place, int]:
    """Bytes that there are for weights, by device; of several processes each keeps to its own GPU."""
    room = {key: int(_FREE * size) for key, size in get_max_memory().items()} | dict(asked)
    here = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "SLURM_NTASKS"
    alone = int(os.environ.get(here, 1)) == 1
    for key in [key for key in room if key not in ("cpu", home) and not alone]:
        del room[key]
    if home not in room:
        raise CachekdError(
            "the free memory of this device is not known",
            where=told_place(home),
            fix=f"say it: --max-memory {home}=20GB",
        )
    return room


def by_file(skeleton: nn.Module, path: Path) -> dict[str, Place]:
    """Each tensor's device, as a file has it.

    Raises:
        CachekdError: as `placed` has it.
    """
    if not path.exists():
        raise CachekdError(
            "there is no such device map",
            where=str(path),
            expected=f"{AUTO}, or a YAML or JSON file of modules and devices, such as '': cpu",
        )
    said = {str(name): _key(value) for name, value in YamlFile.read(path).values.items()}
    modules, layers = {name for name, _ in skeleton.named_modules()}, layers_of(skeleton)
    tensors = _tensors(skeleton)
    for name, key in said.items():
        _require_device(key, f"{name!r} in {path}")
        if name not in modules and name not in tensors:
            near = get_close_matches(name, modules, 1)
            raise CachekdError(
                "the device map names no module of the model",
                where=str(path),
                expected=f"names such as {', '.join(_examples(skeleton))}; '' for all others",
                found=name,
                fix=did_you_mean(near[0] if near else None),
            )
        if (layer := longest_prefix(name, layers)) is not None and layer != name:
            raise CachekdError(
                "a layer lies in one place as a whole",
                where=str(path),
                expected=layer,
                found=name,
            )
    where = {name: said[found] for name in tensors if (found := longest_prefix(name, said)) is not None}
    if missing := [name for name in tensors if name not in where]:
        raise CachekdError(
            "the device map leaves modules out",
            where=str(path),
            expected="a device for every module",
            found=f"{len(missing)} weights without one: {', '.join(missing[:_SHOWN])}",
            fix="add a line for all others, such as '': cpu",
        )
    slow = {"disk"} if set(where.values()) <= {"cpu", "disk"} else {"cpu", "disk"}
    stuck = [name for name, key in where.items() if key in slow and longest_prefix(name, layers) is None]
    if stuck:
        raise CachekdError(
            "only layers can lie off the devices that compute",
            where=str(path),
            expected=f"layers there, such as {', '.join(_examples(skeleton))}; embeddings, norms, projector "
            "and head on a GPU, or where there is none on the CPU",
            found=f"{len(stuck)} others: "
            + ", ".join(f"{name} ({told_place(where[name])})" for name in stuck[:_SHOWN]),
        )
    return where


def _joined(skeleton: nn.Module, where: Mapping[str, Place], name: str = "") -> dict[str, Place]:
    """Whole modules in the place of their tensors, wherever these lie on one device."""
    inside = {where[one] for one in _tensors(skeleton, name)}
    if len(inside) == 1:
        return {name: inside.pop()}
    found: dict[str, Place] = {}
    for child, module in skeleton.named_children():
        found |= _joined(module, where, f"{name}.{child}".lstrip("."))
    own = [*skeleton.named_parameters(recurse=False), *skeleton.named_buffers(recurse=False)]
    return found | {full: where[full] for one, _ in own for full in [f"{name}.{one}".lstrip(".")]}


def _tensors(model: nn.Module, name: str = "") -> dict[str, Tensor]:
    """All parameters and buffers by their names, tied ones under each."""
    prefix = f"{name}." if name else ""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {prefix + one: tensor for one, tensor in named}


def _key(device: Any) -> Place:
    """A device as accelerate has it in a map."""
    text = str(device)
    kind, _, number = text.rpartition(":")
    if text.isdecimal() or (kind and number.isdecimal()):
        return int(number)
    found = accelerator()
    return 0 if found is not None and text == found.type != "mps" else text


def _require_device(key: Place, where: str) -> None:
    found = accelerator()
    count = 0 if found is None else torch.accelerator.device_count()
    known: list[Place] = ["mps"] if found is not None and found.type == "mps" else list(range(count))
    if key not in [*known, "cpu", "disk"]:
        raise CachekdError(
            "there is no such device here",
            where=where,
            expected=f"one of {', '.join(map(str, [*known, 'cpu', 'disk']))}",
            found=key,
        )


def told_place(key: Place) -> str:
    """Say one device."""
    return f"GPU {key}" if isinstance(key, int) else {"cpu": "the CPU", "disk": "the disk"}.get(key, key)


def _examples(skeleton: nn.Module) -> list[str]:
    return list(layers_of(skeleton))[-_SHOWN:]


def _bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]  # tied ones once
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
