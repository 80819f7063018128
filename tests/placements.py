"""Device maps for tiny teachers, and memory that is too small for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from cachekd.models.placement import layers_of


def map_file(folder: Path, places: dict[str, Any]) -> str:
    path = folder / "map.yaml"
    path.write_text(yaml.safe_dump(places))
    return str(path)


def layers_on_disk(folder: Path, model: torch.nn.Module) -> str:
    """A map of all layers of a model on the disk, and all else on the CPU."""
    return map_file(folder, {"": "cpu"} | dict.fromkeys(layers_of(model), "disk"))


def just_enough(model: torch.nn.Module) -> int:
    """Bytes for what is no layer, and the two largest layers: one that stays and one that is fetched."""

    def size(module: torch.nn.Module) -> int:
        return sum(x.numel() * x.element_size() for x in [*module.parameters(), *module.buffers()])

    layers = [size(layer) for layer in layers_of(model).values()]
    return size(model) - sum(layers) + 2 * max(layers)
