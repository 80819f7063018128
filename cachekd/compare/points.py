"""What the runs of a pipeline left: of every point that is done, its student's scores and its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cachekd.compare.results import LeftOut
from cachekd.errors import CachekdError
from cachekd.evaluate import Evaluation
from cachekd.evaluate.scores_file import read_evaluation
from cachekd.paths import SCORES_FILE
from cachekd.pipeline.plan import PlannedStep
from cachekd.pipeline.state import StepState
from cachekd.pipeline.vary import Point as Planned
from cachekd.pipeline.vary import Sweep
from cachekd.report.runs import read_run
from cachekd.train.cost import Cost


@dataclass(frozen=True)
class Point:
    """One value of every axis, and a seed, that is done.

    Attributes:
        variant: of every axis, the value's name.
        run: of the last train step, whose student is looked at.
        cost: None of a run of an earlier version, which did not note it.
        evaluations: by eval step; `models` of each is this student alone.
    """

    variant: dict[str, str]
    seed: int | None
    run: Path
    cost: Cost | None
    evaluations: dict[str, Evaluation]


@dataclass(frozen=True)
class Gathered:
    """All that there is to compare.

    Attributes:
        pipeline: its folder.
        axes: each with the names of its values.
        baseline: what the file says.
        seeds: None is one where the file has none.
    """

    pipeline: str
    axes: dict[str, list[str]]
    baseline: str | None
    seeds: list[int | None]
    points: list[Point] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def gather(sweep: Sweep, states: Mapping[Path, StepState]) -> Gathered:
    """Read what is done and up to date; the rest is named with its state.

    Args:
        states: of every step, by its folder.

    Raises:
        CachekdError: there is nothing to compare in such a pipeline, or nothing is done yet; or a file of a
            finished step cannot be read.
    """
    found = Gathered(
        pipeline=str(sweep.pipeline.out),
        axes={axis.name: [value.name for value in axis.values] for axis in sweep.axes},
        baseline=sweep.pipeline.baseline,
        seeds=[None] if sweep.pipeline.seeds is None else [*sweep.pipeline.seeds],
    )
    for planned in sweep.points:
        student, evals = _asked(planned)
        undone = [step for step in (student, *evals) if states[step.out].state != "done"]
        if student in undone:
            undone = [student]  # whose scores are out of date with it
        for step in undone:
            found.left_out.append(
                LeftOut(point=planned.name, why=f"step {step.name}, {states[step.out].text}")
            )
        done = [step for step in evals if step not in undone]
        if student not in undone and done:
            found.points.append(_point(planned, student, done))
    if not found.points:
        raise CachekdError(
            "there is nothing to compare yet",
            where=found.pipeline,
            found="; ".join(f"{one.point}: {one.why}" for one in found.left_out[:3]),
            fix="`cachekd run` the pipeline; what is finished can be compared while the rest goes on",
        )
    return found


def _asked(planned: Planned) -> tuple[PlannedStep, list[PlannedStep]]:
    """The last train step of a point, and the eval steps that ask its student."""
    trained = [step for step in planned.steps.values() if step.kind == "train"]
    if not trained:
        raise CachekdError("there is nothing to compare: the pipeline has no train step")
    student = trained[-1]
    # Scores on public benchmarks are in each run and its report: they have no answers to compare in pairs.
    evals = [step for step in planned.steps.values() if str(student.out) in _models(step)]
    if not evals:
        raise CachekdError(
            "there is nothing to compare: nobody asks the student",
            where=f"step {student.name!r}",
            expected="an eval step after it",
            fix="add `- {step: eval, name: test, data: PATH}`",
        )
    return student, evals


def _models(step: PlannedStep) -> list[str]:
    return step.config.models if step.kind == "eval" and not step.config.asks_benchmarks else []


def _point(planned: Planned, student: PlannedStep, evals: list[PlannedStep]) -> Point:
    cost = read_run(student.out).saved.get("cost")
    evaluations = {step.name: _own(read_evaluation(step.out / SCORES_FILE), student.out) for step in evals}
    return Point(
        planned.variant,
        planned.seed,
        student.out,
        None if cost is None else Cost.model_validate(cost),
        evaluations,
    )


def _own(evaluation: Evaluation, run: Path) -> Evaluation:
    """The evaluation with the row of this run alone.

    Raises:
        CachekdError: it has none.
    """
    own = [score for score in evaluation.models if Path(score.name) == run]
    if len(own) != 1:
        raise CachekdError(
            "the scores of a finished step lack its student",
            where=str(run),
            found=", ".join(score.name for score in evaluation.models),
        )
    return evaluation.model_copy(update={"models": own, "differences": []})
