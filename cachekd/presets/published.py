"""Configurations as they were published, trimmed to what memory and shapes depend on: a JSON file for each
model in `configs/`, which says where its values are from and which of them no source was found for."""

from __future__ import annotations

import json
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, AutoImageProcessor
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from cachekd.models.families import family_of


class Published:
    """A model by its published shape: neither weights nor tokenizer, and nothing of a hub.

    Args:
        name: of a file in `configs/`.

    Attributes:
        hub: its name on the hub; empty where it has to be put together.
        source: where the values are from.
        unverified: settings that no stored source was found for, from the file's top, dotted.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        said = json.loads(files("cachekd.presets").joinpath("configs", f"{name}.json").read_text())
        self.hub: str = said["hub"]
        self.source: str = said["source"]
        self.unverified: list[str] = said["unverified"]
        self._config, self._pictures = said["config"], said["pictures"]

    @cached_property
    def config(self) -> Any:
        """transformers' own configuration."""
        settings = dict(self._config)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        config.name_or_path = self.hub or self.name
        family_of(config)
        return config

    @cached_property
    def image_processor(self) -> Any:
        """transformers' own, with the published sizes."""
        with TemporaryDirectory() as folder:
            for name, said in ((CONFIG_NAME, self._config), (IMAGE_PROCESSOR_NAME, self._pictures)):
                Path(folder, name).write_text(json.dumps(said))
            return AutoImageProcessor.from_pretrained(folder)
