"""Models in one GGUF file, as llama.cpp has them: read by transformers, and plain models from then on."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GgufConfig, PreTrainedModel


def is_gguf(path: str) -> bool:
    """Whether a GGUF file is meant, and not a model's folder or a name on the hub."""
    return path.endswith(".gguf") and Path(path).is_file()


def source(path: str) -> tuple[str, dict[str, Any]]:
    """What transformers' `from_pretrained` takes: a folder or name, and `gguf_file` if a file is meant."""
    return (str(Path(path).parent), {"gguf_file": Path(path).name}) if is_gguf(path) else (path, {})


def gguf_config(path: str) -> Any:
    """The configuration in a GGUF file. Reading it takes seconds, so it is remembered."""
    file = Path(path).resolve()
    return copy.deepcopy(_read_config(file, file.stat().st_mtime_ns))


@lru_cache(maxsize=4)
def _read_config(file: Path, _changed: int) -> Any:
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def unpacked() -> dict[str, Any]:
    """For `from_pretrained`: every weight as an ordinary tensor."""
    return {"quantization_config": GgufConfig(dequantize=True)}


def forget_gguf(model: PreTrainedModel) -> None:
    """Let a model with unpacked weights be trained and saved, which transformers refuses for GGUF's own."""
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
