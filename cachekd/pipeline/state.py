"""What has been done: a record of every step beside their folders, and what it says of each step today."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cachekd.cache.files import write_file
from cachekd.errors import CachekdError
from cachekd.pipeline.inputs import Known, data_content
from cachekd.pipeline.output import damage_of
from cachekd.pipeline.plan import PlannedStep, in_step
from cachekd.vlm import model_content

STATE_FILE = "pipeline_state.json"
Facts = dict[str, dict[str, Any]]  # "settings", and "inputs": what a step's output depends on
State = Literal["done", "damaged", "changed", "waiting", "running", "interrupted", "failed"]


class Record(BaseModel):
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
    state: Literal["begun", "done", "failed"]
    seconds: float = 0.0
    error: str | None = None
    files: dict[str, int] = {}


class PipelineState(BaseModel):
    """`pipeline_state.json`."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    steps: dict[str, Record] = {}
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
                found=str(error).splitlines()[0],
                fix="restore the file, or choose another `out`: the steps' folders stay as they are",
            ) from None

    def write(self, folder: Path) -> None:
        """All of it or nothing."""
        write_file(folder / STATE_FILE, self.model_dump_json(indent=1).encode())


@dataclass(frozen=True)
class StepState:
    """How a step is today.

    Attributes:
        why: for a step that changed, failed or is damaged.
        seconds: that it took; 0 if it was not begun.
        facts: what its output depends on now.
        continues: the step whose student it goes on with.
    """

    name: str
    kind: str
    out: str
    state: State
    why: str
    seconds: float
    facts: Facts
    continues: str | None = None

    @property
    def text(self) -> str:
        return f"{self.state}: {self.why}" if self.why else self.state


def states_of(steps: list[PlannedStep], state: PipelineState) -> list[StepState]:
    """Every step against its record.

    Raises:
        CachekdError: something that a step reads is not there; the step is named.
    """
    found: dict[str, StepState] = {}
    for step in steps:
        try:
            facts = _facts(step, state)
        except CachekdError as error:
            raise in_step(step.name, error) from None
        record = state.steps.get(step.name)
        found[step.name] = StepState(
            step.name,
            step.kind,
            str(step.out),
            *_judge(step, facts, record, found),
            0.0 if record is None else record.seconds,
            facts,
            step.continues,
        )
    return list(found.values())


def _facts(step: PlannedStep, state: PipelineState) -> Facts:
    """Settings, what is read, and which making of each step above is taken."""
    inputs: dict[str, str | None] = {f"files of {name}": model_content(name) for name in step.models}
    if step.data is not None:
        inputs[f"content of {step.data.data}"] = data_content(step.data, state.known)
    for setting, data in step.other_data.items():
        inputs[f"content of {setting} {data.data}"] = data_content(data, state.known)
    for path in step.files:
        if path.is_file():
            inputs[f"content of {path}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in step.upstream:
        inputs[f"step {name}"] = state.steps[name].id if name in state.steps else None
    return {"settings": step.settings, "inputs": inputs}


def _judge(
    step: PlannedStep, facts: Facts, record: Record | None, above: dict[str, StepState]
) -> tuple[State, str]:
    if record is None:
        return "waiting", ""
    redone = [name for name in step.upstream if above[name].state not in ("done", "damaged")]
    before = step.comparable(step.defaults | record.facts["settings"])
    now = step.comparable(facts["settings"])
    changes = _changes({**record.facts, "settings": before}, {**facts, "settings": now})
    if changes or redone:
        return "changed", "; ".join([*changes, *(f"step {name} is to be redone" for name in redone)])
    if step.finished:  # even where the process died, or could not print, before it could say so
        problem = damage_of(step, record.files)
        return ("damaged", problem) if problem else ("done", "")
    if record.state == "failed":
        return "failed", record.error or ""
    return ("changed", "its output is gone") if record.state == "done" else ("interrupted", "")


def _changes(before: Facts, now: Facts) -> list[str]:
    changes = []
    for name, new in now["settings"].items():
        old = before["settings"].get(name)
        if old != new:
            changes.append(f"{name} {_short(old)} -> {_short(new)}")
    old_inputs, inputs = before["inputs"], now["inputs"]
    for name in {**old_inputs, **inputs}:
        if name not in old_inputs or name not in inputs:
            changes.append(f"another input, {name}")
        elif old_inputs[name] != inputs[name]:
            changes.append(f"{name} was redone" if name.startswith("step ") else f"{name} changed")
    return changes


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
