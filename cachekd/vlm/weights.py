"""A model's weights as files: which they are, and which model they make."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cachekd.errors import CachekdError
from cachekd.paths import BRIDGE_FILE, is_hub_name, require_path
from cachekd.vlm.file_hashes import hash_files
from cachekd.vlm.gguf import is_gguf

_READ_BY_TRANSFORMERS = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}


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


def model_content(name: str) -> str | None:
    """Which model this is: sha256 over the files that `from_pretrained` reads; None for a hub name.

    Raises:
        CachekdError: there is no such folder, and it is no hub name.
    """
    folder = Path(name)
    if not folder.exists():
        expected = "a train step above, a model folder, or a hub name, which has a slash: org/name"
        require_path(name, "step or model", expected)
        if is_hub_name(name):
            return None
        raise CachekdError("there is no such step or model", where=name, expected=expected)
    files = [folder] if folder.is_file() else _read_by_transformers(folder)  # a file: .gguf
    names = "\n".join(path.name for path in files)
    return hashlib.sha256(f"{names}\n{hash_files(files)}".encode()).hexdigest()


def _read_by_transformers(model: Path) -> list[Path]:
    return sorted(
        path
        for path in model.iterdir()
        # The second: what stages leave in a run.
        if path.suffix in _READ_BY_TRANSFORMERS and not path.name.startswith("cachekd_")
    )
