"""A run's folder: begun, resumed, finished; a finished one is never overwritten.

.cachekd.lock           which process is at work here
cachekd_started.json    the settings, and what was read, by its content; written before the first step
checkpoints/            the Trainer's, to go on from, each with its settings; gone when the run is finished
.student.part/          the trained student while its weights are written
model.safetensors ...   the student with its processor
cachekd_run.json        the run is finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from cachekd.atomic import commit, commit_first, remove_stale
from cachekd.config import TrainConfig
from cachekd.errors import CachekdError, is_full_disk, what_failed
from cachekd.lock import alone, require_new_folder
from cachekd.paths import ADAPTER_FOLDER, RUN_FILE
from cachekd.train.checkpoints import SETTINGS_FILE, newest_checkpoint, step_of

STARTED_FILE = "cachekd_started.json"
CHECKPOINTS = "checkpoints"
PART = ".student.part"
INPUTS = "inputs"  # in that file: what was read, by its content
PROCESSES = "processes"


@contextmanager
def claimed(config: TrainConfig) -> Iterator[RunFolder]:
    """The run's folder, for one training at a time: of several processes that share a run, the first one
    holds it.

    Raises:
        CachekdError: another training is at work in it; or as `RunFolder`.
    """
    require_unfinished(config.out)  # of a run that lies where nobody may write, too
    with alone(config.out, "trains in") if _is_first_process() else nullcontext():
        yield RunFolder(config)


class RunFolder:
    """Where a run is written. See `claimed`.

    Raises:
        CachekdError: the folder holds a finished run, a run with other settings, one that is trained but can
            neither be finished nor resumed, or something else.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.out
        self.checkpoints = self.path / CHECKPOINTS
        self.keep_checkpoints = config.keep_checkpoints
        self.settings = config.deciding()
        self._reads: dict[str, Any] = {}  # what this session reads, and in how many processes
        self._earlier: dict[str, Any] = {}  # what the session that began the run noted
        self._begun = self._trained = False
        require_unfinished(self.path)
        started = self.path / STARTED_FILE
        self._is_new = not started.exists()
        if self._is_new:
            self._remove_what_a_kill_left()
            require_new_folder(self.path, "run")
            return
        noted_by_all = self.settings.keys() - TrainConfig.later().keys()
        self._earlier = _read(started, {*noted_by_all, INPUTS, PROCESSES})
        self._require_same_settings(self._earlier, started)
        checkpoint = self.last_checkpoint()
        if checkpoint is not None:
            noted = checkpoint / SETTINGS_FILE
            self._require_same_settings(_read(noted, noted_by_all), noted)
        if checkpoint is None and (saved := saved_models(self.path)):
            raise CachekdError(
                "the run is trained, but it was not finished, and there is no checkpoint to finish it from",
                where=str(self.path),
                found=", ".join(saved),
                fix="these are the trained student, as far as it was saved: use them, or move them away; to "
                "train it again choose another --out, or remove the folder",
            )

    def _remove_what_a_kill_left(self) -> None:
        """Of a session killed before it had begun: the Trainer's folder, and the mark half made."""
        with suppress(OSError):  # it is none, or holds something
            self.checkpoints.rmdir()
        remove_stale(self.path, STARTED_FILE)

    def _require_same_settings(self, earlier: dict[str, Any], noted: Path) -> None:
        before, now = map(TrainConfig.comparable, (earlier, self.settings))
        changed = sorted(name for name in now if before[name] != now[name])
        if changed:
            raise CachekdError(
                "the run was begun with other settings",
                where=str(noted),
                expected=", ".join(f"{name}: {before[name]}" for name in changed),
                found=", ".join(f"{name}: {now[name]}" for name in changed),
                fix="repeat the command that began it, choose another --out, or remove the folder",
            )

    def require_inputs(self, found: dict[str, str], *, processes: int) -> None:
        """Note what the run reads, and in how many processes; of a run that is resumed, refuse what is
        another than when it began.

        Args:
            found: of `inputs_of`.

        Raises:
            CachekdError: an input or the number of processes is another.
        """
        self._reads = {INPUTS: found, PROCESSES: processes}
        if not self._earlier:
            return
        earlier, begun_with = self._earlier[INPUTS], self._earlier[PROCESSES]
        for name, content in found.items():
            if content != earlier.get(name):
                raise CachekdError(
                    f"the run was begun with another {name} at the same path",
                    where=f"{self.path / STARTED_FILE} and {_place(self.settings[name])}",
                    expected=f"content with sha256 {earlier.get(name)}",
                    found=f"sha256 {content}",
                    fix=f"put the {name} back that it began with, choose another --out, or remove the folder",
                )
        if begun_with != processes:
            raise CachekdError(
                "the run was begun with another number of processes",
                where=str(self.path / STARTED_FILE),
                expected=f"{begun_with} processes, which share the samples of each step",
                found=processes,
                fix=f"start {begun_with} (accelerate launch --num_processes {begun_with} ...), choose "
                "another --out, or remove the folder",
            )

    def last_checkpoint(self) -> Path | None:
        """Find the checkpoint to go on from; None where there is none."""
        return newest_checkpoint(self.checkpoints)

    def begin(self) -> None:
        """Mark the folder as a run; in one process.

        Raises:
            CachekdError: another run has begun here meanwhile; or the folder cannot be written.
        """
        shutil.rmtree(self.part, ignore_errors=True)  # of a session that was killed while it saved
        begun = self.path / STARTED_FILE
        content = _json(self.settings | self._reads)
        if not self._is_new:
            commit(begun, content)
        elif not commit_first(begun, content):
            raise CachekdError(
                "another run has begun in this folder",
                where=str(begun),
                fix="run the same command again, to go on with it if it is the same; or choose another --out",
            )
        self._begun = True

    @contextmanager
    def kept_if_worth_it(self) -> Iterator[None]:
        """Leave nothing behind if the block fails in a new run before there is anything to go on from, or to
        look at. What training made stays.

        Raises:
            CachekdError: the disk is full, or cannot be written; what there is, and what to do.
        """
        try:
            yield
        except BaseException as error:
            if self._is_new and not self._trained and _is_first_process():
                self._remove_what_is_worthless()
            if not is_full_disk(error):
                raise
            raise CachekdError(
                "the run cannot go on: the disk is full, or cannot be written",
                where=str(self.path),
                found=what_failed(error),
                fix=f"free some space on this disk; {how_to_go_on(self.path)}",
            ) from error

    def _remove_what_is_worthless(self) -> None:
        """What may be of worth is asked by its name: a disk that fails may not read it just now."""
        kept = ("checkpoint-*/trainer_state.json", "not-finite-*")
        if saved_models(self.path) or any(any(self.checkpoints.glob(name)) for name in kept):
            return
        with suppress(OSError):
            if self._begun:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                (self.path / STARTED_FILE).unlink(missing_ok=True)
            self.checkpoints.rmdir()  # the Trainer makes it

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """The student is trained, and the block saves it: whatever happens now, nothing is removed.

        Raises:
            CachekdError: it could not be saved; what there is, and what to do.
        """
        self._trained = True
        try:
            yield
        except Exception as error:
            if _is_first_process():
                shutil.rmtree(self.part, ignore_errors=True)  # a part of the weights is no model
            raise CachekdError(
                "the student is trained, but the run could not be finished",
                where=str(self.path),
                found=what_failed(error),
                fix=f"mend this, or free some space; {how_to_go_on(self.path)}",
            ) from error

    @property
    def part(self) -> Path:
        """Where the student is saved first, so that no weights in the run's folder are half written."""
        return self.path / PART

    def take_student(self) -> None:
        """What is whole in `part`: into the run's folder, one file after the other."""
        for file in sorted(path for path in self.part.rglob("*") if path.is_file()):
            target = self.path / file.relative_to(self.part)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
        shutil.rmtree(self.part)

    def finish(self, run: dict[str, Any]) -> None:
        """Everything the report needs, beside the model; the run is finished with it, and nothing goes on
        from a checkpoint any more."""
        commit(self.path / RUN_FILE, _json(run))
        if self.keep_checkpoints:
            return
        for checkpoint in self.checkpoints.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        with suppress(OSError):  # the logs of TensorBoard stay
            self.checkpoints.rmdir()


def require_unfinished(path: Path) -> None:
    """Refuse a run's folder that needs no training any more.

    Raises:
        CachekdError: the run is finished.
    """
    if (path / RUN_FILE).exists():
        raise CachekdError(
            "the run is finished, and a finished run is never overwritten",
            where=str(path),
            fix="choose another --out, or remove the folder",
        )


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode()


def _place(setting: str | dict[str, Any]) -> str:
    """Where an input is; data may be said with their options."""
    return setting if isinstance(setting, str) else str(setting["data"])


def _read(noted: Path, names: Iterable[str]) -> dict[str, Any]:
    """Read what was noted when the run began or saved a checkpoint.

    Raises:
        CachekdError: it cannot be read, or lacks one of the names.
    """
    try:
        found: dict[str, Any] = dict(json.loads(noted.read_text()))
        if lacking := sorted(set(names) - found.keys()):
            raise ValueError(f"it lacks {', '.join(lacking)}")
    except (OSError, ValueError, TypeError) as error:
        raise CachekdError(
            "what the run began with cannot be read",
            where=str(noted),
            found=str(error),
            fix="restore the file, choose another --out, or remove the folder",
        ) from None
    return found


def saved_models(out: Path) -> list[str]:
    """What was saved of a trained student, by name: weights, and adapters."""
    files = [path.name for path in out.glob("*.safetensors")]
    return sorted([*files, *([ADAPTER_FOLDER] if (out / ADAPTER_FOLDER).exists() else [])])


def how_to_go_on(out: Path) -> str:
    """What a run's folder holds after it was stopped or failed, and what its command does next."""
    newest = newest_checkpoint(out / CHECKPOINTS)
    if (out / RUN_FILE).exists():
        return f"the run is finished: {out}"
    if newest is not None:
        return f"the same command goes on from step {step_of(newest):,}"
    if saved := saved_models(out):
        return (
            f"{', '.join(saved)} in {out}: the trained student, as far as it was saved. Without a checkpoint "
            "the run cannot be finished, and the same command does not overwrite it"
        )
    return "there was no checkpoint yet: the same command begins anew"


def _is_first_process() -> bool:
    """Before there is a Trainer to ask; launchers, or accelerate in their place, number the processes."""
    return os.environ.get("RANK", "0") == "0"
