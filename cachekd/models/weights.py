"""The files of a model's weights, GGUF among them, and their hash, computed once.

A hash is remembered for as long as no file's name, size, times (of content and of inode) or inode changes.
What that cannot see: content that changes without its file system noting a time, such as a disk's bit rot.
`CACHEKD_HASH_AGAIN=1` reads every byte, whatever is remembered.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field
from transformers import AutoConfig, GgufConfig, PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_FILE

from cachekd.atomic import write_file
from cachekd.cache.sealed import Part, Sealed
from cachekd.errors import CachekdError
from cachekd.paths import BRIDGE_FILE, cache_home, is_hub_name, require_path

log = logging.getLogger(__name__)
_BLOCK = 1 << 22
_SAID_EVERY = 5.0  # seconds
# A file that changes again within the clock's step of its file system keeps its time: younger ones are
# hashed each time.
_SETTLED_NS = 2_000_000_000
# None there, a damaged one, a folder that cannot be written; a user without a home; a name that is no text.
_NO_MEMORY = (CachekdError, OSError, RuntimeError, UnicodeError)
_READ_BY_TRANSFORMERS = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}


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
    """Options of `from_pretrained` that make every weight an ordinary tensor."""
    return {"quantization_config": GgufConfig(dequantize=True)}


def forget_gguf(model: PreTrainedModel) -> None:
    """Let a model with unpacked weights be trained and saved, which transformers refuses for GGUF's own."""
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)


class FileState(Part):
    """What tells that a file is still the one that was hashed; times in ns since 1970."""

    path: str
    size: int
    modified: int
    changed: int  # also where a tool has put the time of the content back
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Look at the file behind links: a hub's snapshot is made of them."""
        real = path.resolve()
        stat = real.stat()
        times = {"modified": stat.st_mtime_ns, "changed": stat.st_ctime_ns}
        return cls(path=str(real), size=stat.st_size, inode=stat.st_ino, **times)


class RememberedHash(Sealed):
    """A file in the memory: one for each list of files, so that two writers never share one half each."""

    files: list[FileState]
    content: str = Field(pattern="^[0-9a-f]{64}$")


def hash_files(files: Sequence[Path]) -> str:
    """sha256 over the bytes of files, one after the other.

    They are read if no earlier call, of whatever process, has read them as they are now. A memory that is
    damaged, or of other files, is not believed; one that cannot be written is done without.

    Raises:
        OSError: a file cannot be read.
    """
    states = [FileState.of(path) for path in files]
    if not os.environ.get("CACHEKD_HASH_AGAIN"):
        with suppress(*_NO_MEMORY):
            known = RememberedHash.read(_place(states))
            if known.files == states:
                return known.content
    started = time.time_ns()
    content = read_and_hash(files)
    settled = all(max(one.modified, one.changed) < started - _SETTLED_NS for one in states)
    if settled and states == [FileState.of(path) for path in files]:
        with suppress(*_NO_MEMORY):
            write_file(_place(states), RememberedHash(files=states, content=content).to_json())
    return content


def read_and_hash(files: Sequence[Path]) -> str:
    """Hash files by reading every byte; what takes longer says how far it is."""
    digest, done, total = hashlib.sha256(), 0, sum(path.stat().st_size for path in files)
    said = time.monotonic()
    for path in files:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                done += len(block)
                if time.monotonic() - said > _SAID_EVERY:
                    said = time.monotonic()
                    log.warning("hashing %s: %.1f of %.1f GB", path.parent, done / 1e9, total / 1e9)
    return digest.hexdigest()


def _place(states: Sequence[FileState]) -> Path:
    """Where these files' hash is remembered: by their names, in the user's cache folder."""
    names = "\n".join(state.path for state in states)
    return cache_home() / "hashes" / f"{hashlib.sha256(os.fsencode(names)).hexdigest()}.json"


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


def template_beside(path: str) -> Path | None:
    """The chat template's file beside a GGUF file, which need not have one in it; None: there is none."""
    file = Path(path).with_name(CHAT_TEMPLATE_FILE)
    return file if is_gguf(path) and file.is_file() else None


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
    if folder.is_file():  # .gguf
        template = template_beside(name)
        files = [folder] if template is None else [folder, template]
    else:
        files = _read_by_transformers(folder)
    names = "\n".join(path.name for path in files)
    return hashlib.sha256(f"{names}\n{hash_files(files)}".encode()).hexdigest()


def _read_by_transformers(model: Path) -> list[Path]:
    return sorted(
        path
        for path in model.iterdir()
        # The second: what stages leave in a run.
        if path.suffix in _READ_BY_TRANSFORMERS and not path.name.startswith("cachekd_")
    )
