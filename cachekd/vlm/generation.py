"""Where generation stops: a student that was taught to end a turn has to be stopped where it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from cachekd.atomic import commit
from cachekd.data import SampleEncoder
from cachekd.vlm.gguf import is_gguf


def generation_stops(path: str, config: Any) -> list[int]:
    """The tokens at which a model's `generate` stops, by its generation_config.json or else its config.

    Args:
        path: folder or hub name.
        config: of `load_config`.
    """
    try:
        found = GenerationConfig.from_model_config(config) if is_gguf(path) else None
        found = found or GenerationConfig.from_pretrained(path)
    except OSError:
        found = GenerationConfig.from_model_config(config)
    return _as_list(found.eos_token_id)


def save_processor(encoder: SampleEncoder, folder: Path) -> None:
    """Write the processor beside a saved student, and let the student's generation stop where its chat
    template ends a turn, beside where it stopped before.

    Args:
        encoder: that the student was trained with.
        folder: with a model, or with adapters alone.
    """
    encoder.processor.save_pretrained(folder)
    file, token = folder / GENERATION_CONFIG_NAME, encoder.end_of_turn
    if token is None or not file.exists():
        return
    settings = json.loads(file.read_text())
    stops = _as_list(settings.get("eos_token_id"))
    if token not in stops:
        settings["eos_token_id"] = [*stops, token] if stops else token
        commit(file, json.dumps(settings, indent=2).encode() + b"\n")


def _as_list(token_ids: int | list[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)
