"""A run's folder: begun, gone on with, finished; a finished one is never overwritten.

cachekd_started.json    the settings, and which cache and binding were read; written before the first step
checkpoints/            the Trainer's, to go on from
model.safetensors ...   the student with its processor
cachekd_run.json        written last: the run is finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cachekd.bind import Binding
from cachekd.cache import LogitCache
from cachekd.cache.compare import identity
from cachekd.config import TrainConfig, defaults_of, require_new_folder
from cachekd.errors import CachekdError
from cachekd.files import RUN_FILE

STARTED_FILE = "cachekd_started.json"
CHECKPOINTS = "checkpoints"
INPUTS = "inputs"  # in that file: what was read, by its content
# Settings that may change between two sessions of one run: they do not change its numbers. (What a stage
# stands for is in the others.)
FREE_SETTINGS = {"out", "workers", "save_steps", "logit_chunk", "gradient_checkpointing", "stage"}


class RunFolder:
    """Where a run is written.

    Raises:
        CachekdError: the folder holds a finished run, a run with other settings, or something else.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.out
        self.checkpoints = self.path / CHECKPOINTS
        self.settings: dict[str, Any] = config.model_dump(mode="json", exclude=FREE_SETTINGS)
        self._inputs: dict[str, str] = {}
        self._earlier_inputs: dict[str, str] | None = None  # of a new run, or of one that did not note them
        if (self.path / RUN_FILE).exists():
            raise CachekdError(
                "the run is finished, and a finished run is never overwritten",
                where=str(self.path),
                fix="choose another --out, or remove the folder",
            )
        started = self.path / STARTED_FILE
        if not started.exists():
            require_new_folder(self.path, "run")
            return
        # A setting that there was not yet when the run began is at its default.
        earlier = defaults_of(TrainConfig) | json.loads(started.read_text())
        self._earlier_inputs = earlier.pop(INPUTS, None)
        changed = sorted(name for name, value in self.settings.items() if earlier.get(name) != value)
        if changed:
            raise CachekdError(
                "the run was begun with other settings",
                where=str(started),
                expected=", ".join(f"{name}: {earlier.get(name)}" for name in changed),
                found=", ".join(f"{name}: {self.settings.get(name)}" for name in changed),
                fix="repeat the command that began it, choose another --out, or remove the folder",
            )

    def require_inputs(self, cache: LogitCache | None, binding: Path | None) -> None:
        """Note what the run reads; of a run that is gone on with, refuse what was made anew since it began.

        Raises:
            CachekdError: the cache or the binding is another.
        """
        if cache is not None:
            self._inputs["cache"] = identity(cache.manifest)
        if binding is not None:
            self._inputs["binding"] = Binding.read(binding).identity
        if self._earlier_inputs is None:
            return
        for name, found in self._inputs.items():
            if found != self._earlier_inputs.get(name):
                raise CachekdError(
                    f"the run was begun with another {name} at the same path",
                    where=f"{self.path / STARTED_FILE} and {self.settings[name]}",
                    expected=f"content with sha256 {self._earlier_inputs.get(name)}",
                    found=f"sha256 {found}",
                    fix=f"put the {name} back that it began with, choose another --out, or remove the folder",
                )

    def last_checkpoint(self) -> str | None:
        """The newest whole checkpoint; the Trainer writes its state last, so one without was cut short."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if _is_whole(path)]
        newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        return None if newest is None else str(newest)

    @contextmanager
    def begun(self, *, main: bool) -> Iterator[None]:
        """Mark the folder as a run; if the block fails with nothing to go on from, leave nothing behind.

        Args:
            main: whether this process is the one that writes.
        """
        if main:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(STARTED_FILE, self.settings | {INPUTS: self._inputs})
        try:
            yield
        except BaseException:
            if main and not (self.checkpoints.exists() and any(self.checkpoints.iterdir())):
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def finish(self, run: dict[str, Any]) -> None:
        """Everything the report needs, beside the model; the run is finished with it."""
        self._write(RUN_FILE, run)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        temporary = self.path / f".{name}.tmp-{os.getpid()}"
        temporary.write_text(json.dumps(value, indent=1))
        temporary.replace(self.path / name)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False
