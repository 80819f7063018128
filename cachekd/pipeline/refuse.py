"""When a pipeline does not go on."""

from __future__ import annotations

import os

from cachekd.cache.files import contents
from cachekd.errors import CachekdError
from cachekd.pipeline.output import damage_of
from cachekd.pipeline.plan import LAST_FILE, PlannedStep, in_step
from cachekd.pipeline.state import StepState


def refuse_many_processes() -> None:
    """A pipeline is one process.

    Raises:
        CachekdError: torchrun or accelerate started several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CachekdError(
            "a pipeline runs in one process",
            found=f"WORLD_SIZE {os.environ['WORLD_SIZE']}",
            fix="start `cachekd run` alone, or the steps' own commands with accelerate launch",
        )


def refuse_damaged(states: list[StepState]) -> None:
    """A finished step lacks files: to put one back takes minutes, to dump again days; which of the two is
    not for us to choose.

    Raises:
        CachekdError: the step, what is wrong, and what can be done.
    """
    for step in states:
        if step.state == "damaged":
            mend = f"`cachekd verify {step.out} --repair`" if step.kind == "dump" else "put the file back"
            raise in_step(
                step.name,
                CachekdError(
                    "the step is finished, but its output is damaged",
                    where=step.out,
                    found=step.why,
                    fix=f"{mend}; or move the folder away: then the step is done again, and what took its "
                    "output too",
                ),
            )


def require_upstream(step: PlannedStep, states: list[StepState]) -> None:
    """The steps above were done a moment ago: now they are not if what they read was changed meanwhile.

    Raises:
        CachekdError: one of them is not.
    """
    for above in states:
        if above.name in step.upstream and above.state != "done":
            raise in_step(
                step.name,
                CachekdError(
                    f"step {above.name!r}, whose output it takes, is not up to date any more",
                    where=above.out,
                    found=above.text,
                    fix="run the same command again when nothing is being changed any more",
                ),
            )


def refuse_foreign(step: PlannedStep) -> None:
    """Nothing that a pipeline did not make is moved or written over.

    Raises:
        CachekdError: the step's folder holds something.
    """
    if step.out.exists() and (not step.out.is_dir() or contents(step.out)):
        raise in_step(
            step.name,
            CachekdError(
                "its folder holds something that this pipeline did not make",
                where=str(step.out),
                expected="a new or empty folder",
                fix="move it away, or give the step another name",
            ),
        )


def require_output(step: PlannedStep) -> None:
    """A step that has ended has left all its files.

    Raises:
        CachekdError: what is missing.
    """
    problem = damage_of(step, {}) if step.finished else f"no {LAST_FILE[step.kind]}"
    if problem:
        raise CachekdError(
            "the step ended without its whole output",
            where=str(step.out),
            found=problem,
            fix="if other processes are still at work on it, wait for them",
        )
