"""Run a pipeline: every group that is not done, each after those that it needs; one that fails stops only
what needs it."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from cachekd.atomic import require_place
from cachekd.errors import CachekdError
from cachekd.lock import Held, holds_something
from cachekd.pipeline.config import PipelineConfig
from cachekd.pipeline.forecast import left
from cachekd.pipeline.run import (
    GO_ON,
    Begun,
    Runner,
    require_no_other,
    require_whole,
    run_group,
    under_way,
)
from cachekd.pipeline.state import STATE_FILE, Attempt, PipelineState, StepState, states_of
from cachekd.pipeline.vary import Group, Sweep, expand
from cachekd.train.inputs import Known

_LOOK_AGAIN = 1.0  # seconds, while another process holds a group


class SomeFailed(CachekdError):
    """Runs failed, and all that does not need them is done."""


def look(pipeline: PipelineConfig) -> list[StepState]:
    """The state of every step of every group; nothing is written.

    Raises:
        CachekdError: a step's settings do not go together, or what it reads is not there.
    """
    states = Board(expand(pipeline)).look()
    return [state for of_group in states.values() for state in of_group]


def run_pipeline(
    pipeline: PipelineConfig,
    runners: Mapping[str, Runner],
    watch: Callable[[Begun], None] = lambda begun: None,
) -> list[StepState]:
    """Do whatever is not done: `run_sweep` of the whole pipeline.

    Returns:
        the state of every step of every group.

    Raises:
        CachekdError: as `run_sweep` does.
    """
    sweep = expand(pipeline)
    run_sweep(sweep, runners, watch)
    return look(pipeline)


class Board:
    """What is done of a pipeline, as the disk has it; data are hashed once for all groups.

    Args:
        sweep: all of it.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.known: dict[str, Known] = {}

    def of(self, group: Group) -> list[StepState]:
        """The states of a group's steps now."""
        state = PipelineState.read(group.out)
        self.known.update({name: one for name, one in state.known.items() if name not in self.known})
        state.known = self.known
        return states_of(group.steps.values(), state, self.above(group))

    def above(self, group: Group) -> list[StepState]:
        """Those of the steps of other groups that it may take the output of."""
        return [state for label in sorted(group.needs) for state in self.of(self.sweep.groups[label])]

    def look(self, labels: Collection[str] | None = None) -> dict[str, list[StepState]]:
        """The states of groups, all by default; what a process is at is running.

        Raises:
            CachekdError: what a step reads is not there.
        """
        found = {}
        for label, group in self.sweep.groups.items():
            if labels is None or label in labels:
                states = self.of(group)
                if any(one.state == "interrupted" for one in states) and under_way(group.out):
                    states = [
                        replace(one, state="running") if one.state == "interrupted" else one for one in states
                    ]
                found[label] = states
        return found


def run_sweep(
    sweep: Sweep,
    runners: Mapping[str, Runner],
    watch: Callable[[Begun], None] = lambda begun: None,
    tell: Callable[[str], None] = lambda line: None,
    labels: Collection[str] | None = None,
) -> None:
    """Do whatever is not done, group by group, in this process.

    Args:
        runners: for dump, train, eval and report, what does a step with its settings.
        watch: called before each step that runs.
        tell: takes lines on how far it is.
        labels: of the groups that are to be done, with all that they need; by default all.

    Raises:
        SomeFailed: the pipeline varies, and steps failed: every one is named.
        CachekdError: bad input, found before any step begins; or the only run failed.
    """
    board = Board(sweep)
    states = ready(board, labels)
    todo = [label for label, found in states.items() if not is_over(sweep.groups[label], found)]
    failed: dict[str, str] = {}
    for number, label in enumerate(todo, 1):
        group = sweep.groups[label]
        if lacking := not_begun(board, group):
            failed[label] = lacking
            tell(f"{group.title}: {lacking}")
            continue
        if sweep.varies:
            still = left(sweep, states, todo[number - 1 :])
            tell(f"run {number:,} of {len(todo):,}: {group.title}, {still.text()}")
        try:
            states[label] = _run_when_free(board, group, runners, watch, tell)
        except CachekdError as error:
            if not sweep.varies:
                raise
            where = str(error.where).removeprefix(f"{label}: ")  # which is said before it
            failed[label] = f"{where}: {error.problem}"
            tell(f"{error}")
        except Exception as error:  # a fault of ours, or of a library: the others go on, and this is told
            if not sweep.varies:
                raise
            failed[label] = f"{type(error).__name__}: {error}"
            tell("".join(traceback.format_exception(error)))
    if failed:
        raise failure(sweep, failed, len(todo))


def ready(board: Board, labels: Collection[str] | None = None) -> dict[str, list[StepState]]:
    """The states of groups, when all that can be known before the first step begins is as it ought to be.

    Raises:
        CachekdError: what is finished is damaged, a folder holds something else or cannot be made, or a step
            that is to run would be refused.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CachekdError(
            "a pipeline runs in one process",
            found=f"WORLD_SIZE {os.environ['WORLD_SIZE']}",
            fix="start `cachekd run` alone, or the steps' own commands with accelerate launch",
        )
    states = board.look(labels)  # what is missing is missed now, not in ten hours
    for label, found in states.items():
        require_whole(found)
        for now in found:
            # In this order: another process that has just begun it noted so before it made the folder.
            if holds_something(now.step.out) and now.name not in _noted(board.sweep.groups[label]):
                require_no_other(now.step)
    waiting = [now.step for found in states.values() for now in found if now.state != "done"]
    if waiting:
        from cachekd.pipeline.checks import check_steps

        require_place(board.sweep.pipeline.out / STATE_FILE)  # once, and not by every run
        check_steps(waiting)
    return states


def _noted(group: Group) -> dict[str, Attempt]:
    return PipelineState.read(group.out).steps


def is_over(group: Group, states: list[StepState]) -> bool:
    """Whether all is done, and noted: a process may have died before it could say so."""
    noted = _noted(group)
    return all(one.state == "done" and noted[one.name].state == "done" for one in states)


def _run_when_free(
    board: Board,
    group: Group,
    runners: Mapping[str, Runner],
    watch: Callable[[Begun], None],
    tell: Callable[[str], None],
) -> list[StepState]:
    """Run a group, once no other process does. Then it may be done."""
    waits = False
    while True:
        try:
            return run_group(group, lambda: board.above(group), board.known, runners, watch)
        except Held as held:
            if not board.sweep.varies:
                raise
            if not waits:
                tell(f"waits for {held.found}, which is at {group.out}")
            waits = True
            time.sleep(_LOOK_AGAIN)


def left_behind(sweep: Sweep) -> list[str]:
    """Folders of runs in the pipeline's that no run of the file has now, as after a value was renamed."""
    out = sweep.pipeline.out
    states = [*out.glob(f"*/{STATE_FILE}"), *out.glob(f"*/*/{STATE_FILE}")]
    return sorted({path.parent.relative_to(out).as_posix() for path in states} - sweep.groups.keys())


def not_begun(board: Board, group: Group) -> str | None:
    """Why a group cannot be begun, if what its steps take was not made when its turn came."""
    taken = {name for step in group.steps.values() for name in step.upstream}
    for above in board.above(group):
        if above.name in taken and above.state != "done":
            return f"not begun: it needs {above.step.what} {above.name!r}, which is not done"
    return None


def failure(sweep: Sweep, failed: Mapping[str, str], runs: int) -> SomeFailed:
    """One error for all that failed."""
    lines = [f"\n  {sweep.groups[label].title}: {why}" for label, why in failed.items()]
    return SomeFailed(
        f"{len(failed):,} of {runs:,} runs {'is' if len(failed) == 1 else 'are'} not done:{''.join(lines)}",
        fix=f"mend that, and {GO_ON}",
    )
