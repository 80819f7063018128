"""Run a pipeline: whatever is not done, in order; nothing that is there is overwritten."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cachekd.cache.tail.sketch import forget_sketches
from cachekd.errors import CachekdError, within
from cachekd.lock import LEASE_FILE, LOCK_FILE, alone, entries, holds_something
from cachekd.models.device import free_memory
from cachekd.pipeline.config import PipelineConfig
from cachekd.pipeline.plan import KINDS, PlannedStep, plan_steps
from cachekd.pipeline.state import Attempt, PipelineState, StepState, files_of, states_of

DOING = "runs the pipeline of"
GO_ON = "run the same command again: finished steps stay as they are"
_PATIENCE = 0.5  # seconds; somebody's --status holds the lock for a moment
Runner = Callable[[Any], object]


class Begun(NamedTuple):
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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CachekdError(
            "a pipeline runs in one process",
            found=f"WORLD_SIZE {os.environ['WORLD_SIZE']}",
            fix="start `cachekd run` alone, or the steps' own commands with accelerate launch",
        )
    steps = plan_steps(pipeline)
    before = PipelineState.read(pipeline.out)
    found = states_of(steps, before)  # what is missing is missed now, not in ten hours
    _require_whole(found)
    for step in steps:
        if step.name not in before.steps:
            _require_no_other(step)
    if waiting := [state.step for state in found if state.state != "done"]:
        from cachekd.pipeline.checks import check_steps

        check_steps(waiting)
    with alone(pipeline.out, DOING, patience=_PATIENCE):
        state = PipelineState.read(pipeline.out)
        state.known = before.known
        for index, step in enumerate(steps):
            found = states_of(steps, state)
            _require_whole(found)
            _require_upstream(step, found)
            if found[index].state != "done":
                _do(step, found[index], state, runners[step.kind], watch)
            elif state.steps[step.name].state != "done":  # by a process that died before it could say so
                _note(state, step, {"state": "done", "error": None, "files": files_of(step)})
        return states_of(steps, state)


def _do(
    step: PlannedStep, now: StepState, state: PipelineState, run: Runner, watch: Callable[[Begun], None]
) -> None:
    moved = None
    if now.state not in ("interrupted", "failed"):  # which are gone on with
        if now.state == "waiting":
            _require_no_other(step)
        moved = _move_aside(step.out)
        state.steps[step.name] = Attempt(id=secrets.token_hex(8), facts=now.facts)
    _note(state, step, {"state": "begun", "error": None})
    watch(Begun(step, now, moved))
    started = time.perf_counter()
    noted: dict[str, Any] = {}
    try:
        run(step.config)
        _require_output(step)
        noted = {"state": "done", "files": files_of(step)}
    except CachekdError as error:
        noted = {"state": "failed", "error": error.problem}
        raise within(f"step {step.name!r}", error, _then(error)) from error
    except Exception as error:
        noted = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        seconds = state.steps[step.name].seconds + time.perf_counter() - started
        _note(state, step, noted | {"seconds": seconds})
        forget_sketches()  # and their copies on the GPU
        free_memory()  # the next step's models need the room of this one's


def _note(state: PipelineState, step: PlannedStep, update: dict[str, Any]) -> None:
    """Note it of the step, on the disk."""
    state.steps[step.name] = state.steps[step.name].model_copy(update=update)
    state.write(step.out.parent)


def _then(error: CachekdError) -> str | None:
    """How to go on, after what the error itself advises."""
    if error.fix is None:
        return f"mend that, and {GO_ON}"
    return None if "same command again" in error.fix else f"then {GO_ON}"


def _move_aside(path: Path) -> Path | None:
    """Keep an old output under another name; returns it, or None where there is nothing."""
    if not os.path.lexists(path) or (path.is_dir() and not entries(path)):
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


# ---- when it does not go on


def _refuse(step: PlannedStep, problem: str, *, fix: str, **said: str) -> None:
    raise CachekdError(problem, where=f"step {step.name!r}: {step.out}", fix=fix, **said)


def _require_whole(states: list[StepState]) -> None:
    """A finished step lacks files: to put one back takes minutes, to dump again days; which of the two is
    not for us to choose."""
    for now in states:
        if now.state == "damaged":
            dumped = now.step.kind == "dump"
            mend = f"`cachekd verify {now.step.out} --repair`" if dumped else "put the file back"
            anew = "or move the folder away: then the step is done again, and what took its output too"
            problem = "the step is finished, but its output is damaged"
            _refuse(now.step, problem, found=now.why, fix=f"{mend}; {anew}")


def _require_no_other(step: PlannedStep) -> None:
    """Refuse to move or to write over what a pipeline did not make."""
    if holds_something(step.out):
        _refuse(
            step,
            "its folder holds something that this pipeline did not make",
            expected="a new or empty folder",
            fix="move it away, or give the step another name",
        )


def _require_upstream(step: PlannedStep, states: list[StepState]) -> None:
    """The steps above were done a moment ago: now they are not if what they read was changed meanwhile."""
    for above in states:
        if above.name in step.upstream and above.state != "done":
            problem = f"step {above.name!r}, whose output it takes, is not up to date any more"
            fix = "run the same command again when nothing is being changed any more"
            _refuse(step, problem, found=above.text, fix=fix)


def _require_output(step: PlannedStep) -> None:
    """A step that has ended has left the file that says so."""
    if not step.finished:
        raise CachekdError(
            "the step ended without its whole output",
            where=str(step.out),
            found=f"no {KINDS[step.kind].last_file}",
            fix="if other processes are still at work on it, wait for them",
        )
