"""What has been done: a note on every step beside their folders, and what it says of each step today."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cachekd.atomic import write_file
from cachekd.cache.layout import SHARD_FOLDER
from cachekd.errors import CachekdError, about, first_line
from cachekd.models import model_content
from cachekd.paths import REPORT_FILE
from cachekd.pipeline.plan import PlannedStep
from cachekd.train.inputs import Known, data_content

STATE_FILE = "pipeline_state.json"
Facts = dict[str, dict[str, Any]]  # "settings", and "inputs": what a step's output depends on
State = Literal["done", "damaged", "changed", "waiting", "running", "interrupted", "failed"]


class Attempt(BaseModel):
    """One step, as it was last begun.

    Attributes:
        id: of this making of its output; a step that is redone gets another, and so all that took it is
            redone.
        facts: what its output depends on.
        state: begun, done or failed; begun and not under way: it was interrupted.
        seconds: of all sessions that came to an end.
        error: the problem, if it failed.
        files: the bytes of what it left, when it was done.
    """

    model_config = ConfigDict(extra="forbid")

    id: str
    facts: Facts
    state: Literal["begun", "done", "failed"] = "begun"
    seconds: float = 0.0
    error: str | None = None
    files: dict[str, int] = {}


class PipelineState(BaseModel):
    """`pipeline_state.json`."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    steps: dict[str, Attempt] = {}
    known: dict[str, Known] = {}

    @classmethod
    def read(cls, folder: Path) -> PipelineState:
        """The state in a pipeline's folder; an empty one where there is none.

        Raises:
            CachekdError: it cannot be read.
        """
        path = folder / STATE_FILE
        if not path.exists():
            return cls()
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise CachekdError(
                "the pipeline's state cannot be read",
                where=str(path),
                found=first_line(error),
                fix="restore the file, or choose another `out`: the steps' folders stay as they are",
            ) from None

    def write(self, folder: Path) -> None:
        """Write all of it or nothing."""
        write_file(folder / STATE_FILE, self.model_dump_json(indent=1).encode())


@dataclass(frozen=True)
class StepState:
    """How a step is today.

    Attributes:
        why: for a step that changed, failed or is damaged.
        seconds: that it took; 0 if it was not begun.
        facts: what its output depends on now.
        making: the id of the last making of its output; None if it was never begun.
    """

    step: PlannedStep
    state: State
    why: str
    seconds: float
    facts: Facts
    making: str | None = None

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def text(self) -> str:
        return f"{self.state}: {self.why}" if self.why else self.state

    def to_dict(self) -> dict[str, Any]:
        """Return what scripts get of it."""
        step = {"name": self.name, "kind": self.step.kind, "out": str(self.step.out)}
        now = {"state": self.state, "why": self.why, "seconds": self.seconds}
        return {**step, **now, "continues": self.step.continues}


def states_of(
    steps: Collection[PlannedStep], state: PipelineState, above: Iterable[StepState] = ()
) -> list[StepState]:
    """Compare every step with how it was last begun.

    Args:
        above: those of other groups whose output the steps take.

    Raises:
        CachekdError: something that a step reads is not there; the step is named.
    """
    found = {other.name: other for other in above}
    for step in steps:
        with about(step.name, what=step.what):
            inputs = _inputs(step, state.known) | {
                f"step {name}": found[name].making for name in step.upstream
            }
            facts = {"settings": step.config.deciding(), "inputs": inputs}
        last = state.steps.get(step.name)
        redone = [name for name in step.upstream if found[name].state not in ("done", "damaged")]
        judged = _judge(step, facts, last, redone)
        seconds, making = (0.0, None) if last is None else (last.seconds, last.id)
        found[step.name] = StepState(step, *judged, seconds, facts, making)
    return [found[step.name] for step in steps]


def _inputs(step: PlannedStep, known: dict[str, Known]) -> dict[str, str | None]:
    """What is read and no step makes, by its content."""
    inputs: dict[str, str | None] = {f"files of {name}": model_content(name) for name in step.models}
    for setting, data in step.data.items():
        name = data.data if setting == "data" else f"{setting} {data.data}"
        inputs[f"content of {name}"] = data_content(data, known)
    for path in filter(Path.is_file, step.files):
        with path.open("rb") as file:  # a benchmark's data may be gigabytes
            inputs[f"content of {path}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return inputs


def _judge(step: PlannedStep, facts: Facts, last: Attempt | None, redone: list[str]) -> tuple[State, str]:
    if last is None:
        return "waiting", ""
    changes = [*_changes(step, last.facts, facts), *(f"step {name} is to be redone" for name in redone)]
    if changes:
        return "changed", "; ".join(changes)
    if step.finished:  # even where the process died before it could say so
        problem = damage_of(step, last.files)
        return ("damaged", problem) if problem else ("done", "")
    if last.state == "failed":
        return "failed", last.error or ""
    return ("changed", "its output is gone") if last.state == "done" else ("interrupted", "")


def _changes(step: PlannedStep, before: Facts, now: Facts) -> list[str]:
    old, new = (step.config.comparable(facts["settings"]) for facts in (before, now))
    differing = [name for name in new if old.get(name) != new[name]]
    changes = [f"{name} {_short(old.get(name))} -> {_short(new[name])}" for name in differing]
    old, new = before["inputs"], now["inputs"]
    for name in {**old, **new}:
        if name not in old or name not in new:
            changes.append(f"another input, {name}")
        elif old[name] != new[name]:
            changes.append(f"{name} was redone" if name.startswith("step ") else f"{name} changed")
    return changes


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def files_of(step: PlannedStep) -> dict[str, int]:
    """The files in a step's folder and their bytes, by which it is seen later whether all are there.

    Of the folders in it only a cache's shards: a finished run does without its checkpoints. Nor what `report`
    leaves in a run.
    """
    later = step.out / REPORT_FILE if step.kind == "train" else None
    return {
        path.relative_to(step.out).as_posix(): path.stat().st_size
        for path in sorted([*step.out.iterdir(), *step.out.glob(f"{SHARD_FOLDER}/*")])
        if path.is_file() and not path.name.startswith(".") and path != later
    }


def damage_of(step: PlannedStep, noted: dict[str, int]) -> str | None:
    """The first file of a finished step that is not as it was, and how; None where all are.

    Args:
        noted: `files_of` when it was finished.
    """
    found = files_of(step)
    for name, size in noted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]:,} bytes, not {size:,}"
    return None
