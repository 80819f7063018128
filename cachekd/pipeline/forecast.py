"""How long what is left will take, from what finished steps like it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cachekd.pipeline.state import StepState
from cachekd.pipeline.vary import Group, Sweep

States = Mapping[str, list[StepState]]  # by the group's label


@dataclass(frozen=True)
class Left:
    """What is still to be done.

    Attributes:
        steps: that are not done.
        seconds: that they will take, one after the other, as far as steps like them are finished.
        unknown: how many of the steps are like none that is finished.
    """

    steps: int
    seconds: float
    unknown: int

    def text(self, jobs: int = 1) -> str:
        """Say it, as in "some 35 minutes left"."""
        if self.unknown == self.steps:
            return "time left not known yet"
        about = "some" if not self.unknown else "at least"
        return f"{about} {duration(self.seconds / jobs)} left"


def duration(seconds: float) -> str:
    """Seconds in words, roughly.

    >>> [duration(seconds) for seconds in (8, 95, 2100, 9000, 200000)]
    ['8 seconds', '2 minutes', '35 minutes', '2.5 hours', '2.3 days']
    """
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} days"


def left(sweep: Sweep, states: States, labels: Iterable[str]) -> Left:
    """What is left of some groups."""
    finished = [
        (sweep.groups[label], state)
        for label, of_group in states.items()
        for state in of_group
        if state.state == "done" and state.seconds > 0
    ]
    waiting = [(sweep.groups[label], state) for label in labels for state in states[label]]
    waiting = [(group, state) for group, state in waiting if state.state != "done"]
    guesses = [_guess(group, state, finished) for group, state in waiting]
    known = [guess for guess in guesses if guess is not None]
    return Left(len(waiting), sum(known), len(guesses) - len(known))


def _guess(group: Group, state: StepState, finished: list[tuple[Group, StepState]]) -> float | None:
    """Seconds, as the mean of those of the same kind; of the same name, if there are any; of those the ones
    whose values of the axes differ least. What an interrupted step has done already is not known."""
    alike = [(other, done) for other, done in finished if done.step.kind == state.step.kind]
    alike = [(other, done) for other, done in alike if done.name == state.name] or alike
    if not alike:
        return None
    apart = [len(group.variant.items() ^ other.variant.items()) for other, _ in alike]
    nearest = [done.seconds for (_, done), far in zip(alike, apart, strict=True) if far == min(apart)]
    return sum(nearest) / len(nearest)
