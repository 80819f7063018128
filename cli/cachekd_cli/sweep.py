"""What `cachekd run` says of a pipeline that varies: its points, what is left, and until when."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from cachekd.errors import some_of
from cachekd_cli.console import console, say, table

if TYPE_CHECKING:
    from cachekd.pipeline import Point, StepState, Sweep
    from cachekd.pipeline.forecast import Left, States


def print_points(sweep: Sweep, points: Sequence[Point], states: States) -> None:
    """Print points by steps, what is wrong, what an earlier file left, and what is left to do."""
    from cachekd.pipeline.sweep import left_behind

    names = [step.name for step in sweep.pipeline.steps]
    rows = []
    for point in points:
        of_steps = _of(point, states)
        rows.append((point.name, *(of_steps[name].state for name in names)))
    console.print(table(f"pipeline {sweep.pipeline.out}", ("run", *names), rows))
    for label, found in states.items():
        for one in found:
            if one.why:
                say(f"{one.step.what} {one.name!r}: {one.text}" if label else f"{one.name!r}: {one.text}")
    if others := left_behind(sweep):
        say(f"left as they are, as no run of this file has these folders: {some_of(others)}")
    say(left_text(_left(sweep, states)) if points else "none of the runs is in this share")


def points_for_scripts(sweep: Sweep, points: Sequence[Point], states: States) -> dict[str, Any]:
    """What `--json` prints: the points with their steps, and what is left."""
    from cachekd.pipeline.sweep import left_behind

    still = _left(sweep, states)
    return {
        "points": [
            {
                "name": point.name,
                "variant": point.variant,
                "seed": point.seed,
                "steps": [state.to_dict() for state in _of(point, states).values()],
            }
            for point in points
        ],
        "left": {"steps": still.steps, "seconds": still.seconds, "unknown": still.unknown},
        "left_behind": left_behind(sweep),
    }


def left_text(still: Left) -> str:
    """How many steps are left, and until when they take one process."""
    if not still.steps:
        return "all is done"
    steps = "1 step is" if still.steps == 1 else f"{still.steps:,} steps are"
    until = datetime.now().astimezone() + timedelta(seconds=still.seconds)
    when = "" if still.unknown else f", until {until:%A %H:%M} in one process"
    return f"{steps} left: {still.text()}{when}"


def _left(sweep: Sweep, states: States) -> Left:
    from cachekd.pipeline.forecast import left

    return left(sweep, states, states)


def _of(point: Point, states: States) -> dict[str, StepState]:
    """A point's steps as they are now."""
    return {
        name: next(one for one in states[label] if one.name == name) for name, label in point.groups.items()
    }
