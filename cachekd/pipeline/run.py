"""Run the steps of one group: whatever is not done, in order; nothing that is there is overwritten."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cachekd.cache.tail.sketch import forget_sketches
from cachekd.errors import CachekdError, within
from cachekd.lock import LEASE_FILE, LOCK_FILE, alone, entries, holds_something
from cachekd.models.device import free_memory
from cachekd.pipeline.plan import KINDS, PlannedStep
from cachekd.pipeline.state import Attempt, PipelineState, StepState, files_of, states_of
from cachekd.pipeline.vary import Group
from cachekd.train.inputs import Known

DOING = "runs the pipeline of"
GO_ON = "run the same command again: finished steps stay as they are"
_PATIENCE = 0.5  # seconds; somebody's --status holds the lock for a moment
Runner = Callable[[Any], object]


class Begun(NamedTuple):
    """What a watcher is told when a step begins: its state before, and where an old output went."""

    step: PlannedStep
    before: StepState
    moved_to: Path | None


def run_group(
    group: Group,
    above: Callable[[], list[StepState]],
    known: dict[str, Known],
    runners: Mapping[str, Runner],
    watch: Callable[[Begun], None],
) -> list[StepState]:
    """Do every step of a group that is not done; those that changed, and all that takes their output, are
    done again.

    An output that a changed step leaves behind is moved to `<step>.old-1`, `-2`, ..., and stays there.

    Args:
        above: looks at the steps of the groups whose output these take.
        known: contents that were found before.
        runners: for dump, train, eval and report, what does a step with its settings.
        watch: called before each step that runs.

    Raises:
        Held: another process runs this group.
        CachekdError: a step failed, or what is finished is damaged. Its name is said, and what is finished
            stays.
    """
    with alone(group.out, DOING, patience=_PATIENCE):
        state = PipelineState.read(group.out)
        state.known = known
        for index, step in enumerate(group.steps.values()):
            others = above()
            found = states_of(group.steps.values(), state, others)
            require_whole(found)
            _require_upstream(step, [*others, *found])
            if found[index].state != "done":
                _do(step, found[index], state, runners[step.kind], watch)
            elif state.steps[step.name].state != "done":  # by a process that died before it could say so
                _note(state, step, {"state": "done", "error": None, "files": files_of(step)})
        return states_of(group.steps.values(), state, above())


def _do(
    step: PlannedStep, now: StepState, state: PipelineState, run: Runner, watch: Callable[[Begun], None]
) -> None:
    moved = None
    if now.state not in ("interrupted", "failed"):  # which are resumed
        if now.state == "waiting":
            require_no_other(step)
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
        raise within(f"{step.what} {step.name!r}", error, _then(error)) from error
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


def under_way(folder: Path) -> bool:
    """Whether some process runs what is in this folder."""
    if not any((folder / name).exists() for name in (LOCK_FILE, LEASE_FILE)):
        return False
    try:
        with alone(folder, DOING):
            return False
    except CachekdError:
        return True


# ---- when it does not go on


def _refuse(step: PlannedStep, problem: str, *, fix: str, **said: str) -> None:
    raise CachekdError(problem, where=f"{step.what} {step.name!r}: {step.out}", fix=fix, **said)


def require_whole(states: list[StepState]) -> None:
    """A finished step lacks files: to put one back takes minutes, to dump again days; which of the two is
    not for us to choose."""
    for now in states:
        if now.state == "damaged":
            dumped = now.step.kind == "dump"
            mend = f"`cachekd verify {now.step.out} --repair`" if dumped else "put the file back"
            anew = "or move the folder away: then the step is done again, and what took its output too"
            problem = "the step is finished, but its output is damaged"
            _refuse(now.step, problem, found=now.why, fix=f"{mend}; {anew}")


def require_no_other(step: PlannedStep) -> None:
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
