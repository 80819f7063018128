"""`cachekd run`: dump, train in stages, evaluate and report, from one file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekd_cli import dump, evaluate, train
from cachekd_cli.console import console, errors, print_result, quiet_libraries, say, table
from cachekd_cli.options import AsJson
from cachekd_cli.signals import stopping_in_order

if TYPE_CHECKING:
    from cachekd.config import TrainConfig
    from cachekd.pipeline import StepState
    from cachekd.pipeline.run import Begun
    from cachekd.train import TrainSummary


def run_command(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline's YAML file.")],
    status: Annotated[
        bool, typer.Option("--status", help="Show what is done and what would run, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the steps of a file: dump, train in stages, eval, report.

    Example: cachekd run examples/easy_vqa/pipeline.yaml

    The same command again skips what is finished, goes on with what was cut short, and does again what
    changed in the file or on the disk, together with every step that takes its output. The output that was
    there before is moved to NAME.old-1. What the file may say: docs/pipelines.md.
    """
    from cachekd.pipeline import plan_steps, read_pipeline

    config = read_pipeline(pipeline)
    plan_steps(config)  # a mistake in the file is said before torch is loaded
    quiet_libraries()  # before anything imports bitsandbytes, which speaks
    from cachekd.pipeline import look, run_pipeline

    go_on = "the same command goes on from here; what is finished stays"
    with stopping_in_order(lambda stop: f"{str(stop) or 'stopped'}: {go_on}"):
        states = look(config) if status else run_pipeline(config, runners(quiet=as_json), announce)
    words = partial(print_states, title=f"pipeline {config.out}")
    print_result(as_json, states, words, lambda states: [state.to_dict() for state in states])


def runners(quiet: bool) -> dict[str, Callable[[Any], object]]:
    """What runs each kind of step, as its own command does; quiet ones print no summary."""

    def then(run: Callable[[Any], Any], show: Callable[[Any], None]) -> Callable[[Any], object]:
        return run if quiet else lambda config: show(run(config))

    def train_step(config: TrainConfig) -> TrainSummary:
        train.fetch_cache(config)
        if not quiet:
            train.print_settings(config)
        return train.run_train(config, description=config.out.name)

    return {
        "dump": then(dump.run_dump, dump.print_summary),
        "train": then(train_step, train.print_summary),
        "eval": then(evaluate.run_eval, evaluate.print_tables),
        "report": then(evaluate.run_report, evaluate.print_page),
    }


def announce(begun: Begun) -> None:
    """Say that a step begins, what it found, and what it takes from others."""
    errors.rule(f"[bold]{begun.step.name}[/] ({begun.step.kind})", align="left")
    told = [begun.before.text] if begun.before.state != "waiting" else []
    if begun.step.continues is not None:
        told.append(f"goes on with the student of step {begun.step.continues!r}")
    if begun.moved_to is not None:
        told.append(f"the old output is now {begun.moved_to}")
    for line in told:
        say(line, errors, style="dim")


def print_states(states: list[StepState], title: str) -> None:
    """Print the steps, and what is done of them."""
    rows = [
        (
            s.name,
            s.step.kind if s.step.continues is None else f"{s.step.kind}, from {s.step.continues}",
            f"{s.seconds:,.1f} s" if s.seconds else "",
            s.text,
        )
        for s in states
    ]
    console.print(table(title, ("step", "what", "time", "state"), rows))
