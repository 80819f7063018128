"""A model's weights as files: which they are, and which model they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachekd.errors import CachekdError
from cachekd.files import BRIDGE_FILE
from cachekd.fingerprint import weights_fingerprint
from cachekd.vlm.gguf import is_gguf


def weights_files(path: str) -> list[Path]:
    """The weight files of a local model folder (or the GGUF file itself), sorted; none for a hub name.

    A run's switch bridge is none.

    Raises:
        CachekdError: a local folder has none.
    """
    folder = Path(path)
    if is_gguf(path):
        return [folder]
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != BRIDGE_FILE)
    files = files or sorted(folder.glob("*.bin"))
    if not files:
        raise CachekdError(
            "the model's folder has no weights", where=path, expected="*.safetensors or *.bin files"
        )
    return files


def weights_identity(path: str, config: Any) -> str:
    """Which weights these are: sha256 over a local folder's, or hub:commit.

    Args:
        config: as it was loaded from `path`.
    """
    files = weights_files(path)
    return weights_fingerprint(files) if files else f"hub:{getattr(config, '_commit_hash', None)}"
