"""Run a pipeline: whatever is not done, in order; nothing that is there is overwritten."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachekd.cache.files import LEASE_FILE, LOCK_FILE, contents
from cachekd.cache.lock import alone
from cachekd.cache.sketch import forget_sketches
from cachekd.errors import CachekdError
from cachekd.failures import free_memory
from cachekd.pipeline.config import PipelineConfig
from cachekd.pipeline.output import files_of
from cachekd.pipeline.plan import PlannedStep, in_step, plan_steps
from cachekd.pipeline.refuse import (
    refuse_damaged,
    refuse_foreign,
    refuse_many_processes,
    require_output,
    require_upstream,
)
from cachekd.pipeline.state import PipelineState, Record, StepState, states_of

DOING = "runs the pipeline of"
GO_ON = "run the same command again: finished steps stay as they are"
_PATIENCE = 0.5  # seconds; somebody's --status holds the lock for a moment
Runner = Callable[[Any], object]


@dataclass(frozen=True)
class Begun:
    """What a watcher is told when a step begins: its state before, and where an old output went."""

    step: PlannedStep
    before: StepState
    moved_to: Path | None


def look(pipeline: PipelineConfig) -> list[StepState]:
    """The state of every step; nothing is written.

    Raises:
        CachekdError: a step's settings do not go together, or what it reads is not there.
    """
    states = states_of(plan_steps(pipeline), PipelineState.read(pipeline.out))
    if not _under_way(pipeline.out):
        return states
    return [replace(s, state="running") if s.state == "interrupted" else s for s in states]


def run_pipeline(
    pipeline: PipelineConfig,
    runners: Mapping[str, Runner],
    watch: Callable[[Begun], None] = lambda begun: None,
) -> list[StepState]:
    """Do every step that is not done; those that changed, and all that takes their output, are done again.

    An output that a changed step leaves behind is moved to `<step>.old-1`, `-2`, ..., and stays there.

    Args:
        runners: for dump, train, eval and report, what does a step with its settings.
        watch: called before each step that runs.

    Raises:
        CachekdError: bad input, found before any step begins; another process runs this pipeline; a step
            failed. Its name is said, and what is finished stays.
    """
    refuse_many_processes()
    steps = plan_steps(pipeline)
    before = PipelineState.read(pipeline.out)
    found = states_of(steps, before)  # what is missing is missed now, not in ten hours
    refuse_damaged(found)
    _refuse_what_would_fail(steps, found, before)
    with alone(pipeline.out, DOING, patience=_PATIENCE):
        state = PipelineState.read(pipeline.out)
        state.known = before.known
        for index, step in enumerate(steps):
            found = states_of(steps, state)
            refuse_damaged(found)
            require_upstream(step, found)
            now = found[index]
            if now.state == "done":
                _accept(state, step, pipeline.out)
            else:
                _do(step, now, state, pipeline.out, runners[step.kind], watch)
        return states_of(steps, state)


def _refuse_what_would_fail(steps: list[PlannedStep], found: list[StepState], before: PipelineState) -> None:
    for step in steps:
        if step.name not in before.steps:
            refuse_foreign(step)
    names = {state.name for state in found if state.state != "done"}
    if names:
        from cachekd.pipeline.checks import check_steps  # imports the Trainer; --status does without

        check_steps(steps, names)


def _do(
    step: PlannedStep,
    now: StepState,
    state: PipelineState,
    folder: Path,
    run: Runner,
    watch: Callable[[Begun], None],
) -> None:
    goes_on = now.state in ("interrupted", "failed")
    record = state.steps.get(step.name)
    moved = None
    if not goes_on:
        if record is None:
            refuse_foreign(step)
        moved = _move_aside(step.out)
        record = Record(id=secrets.token_hex(8), facts=now.facts, state="begun")
    assert record is not None  # what goes on was begun
    record.state, record.error = "begun", None
    state.steps[step.name] = record
    state.write(folder)
    watch(Begun(step, now, moved))
    started = time.perf_counter()
    try:
        run(step.config)
        require_output(step)
    except Exception as error:
        record.state = "failed"
        record.error = (
            error.problem if isinstance(error, CachekdError) else f"{type(error).__name__}: {error}"
        )
        if isinstance(error, CachekdError):
            raise in_step(step.name, error, _then(error)) from error
        raise
    else:
        record.state, record.files = "done", files_of(step)
    finally:
        record.seconds += time.perf_counter() - started
        state.write(folder)
        forget_sketches()  # and their copies on the GPU
        free_memory()  # the next step's models need the room of this one's


def _accept(state: PipelineState, step: PlannedStep, folder: Path) -> None:
    """A step that was finished by a process that died before it could say so."""
    record = state.steps[step.name]
    if record.state != "done":
        record.state, record.error, record.files = "done", None, files_of(step)
        state.write(folder)


def _then(error: CachekdError) -> str | None:
    """How to go on, after what the error itself advises."""
    if error.fix is None:
        return f"mend that, and {GO_ON}"
    return None if "same command again" in error.fix else f"then {GO_ON}"


def _move_aside(path: Path) -> Path | None:
    """Keep an old output under another name; returns it, or None where there is nothing."""
    if not os.path.lexists(path) or (path.is_dir() and not contents(path)):
        return None
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    path.rename(aside)
    return aside


def _under_way(folder: Path) -> bool:
    """Whether some process runs this pipeline."""
    if not any((folder / name).exists() for name in (LOCK_FILE, LEASE_FILE)):
        return False
    try:
        with alone(folder, DOING):
            return False
    except CachekdError:
        return True
