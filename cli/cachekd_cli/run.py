"""`cachekd run`: dump, train in stages, evaluate and report, from one file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekd.errors import CachekdError
from cachekd_cli import dump, evaluate, train
from cachekd_cli.console import console, errors, print_result, quiet_libraries, say, table
from cachekd_cli.jobs import run_jobs
from cachekd_cli.options import AsJson
from cachekd_cli.signals import stopping_in_order
from cachekd_cli.sweep import points_for_scripts, print_points

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
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Of a file that varies, the runs with such a value (ce), values (ce,limit=250) or seed "
            "(seed-3, */seed-3); * and ? match any letters. Again for more.",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="One process' share on a cluster: every N-th run from the I-th on, I from 0. What several "
            "of them need is done by the first, and the others wait.",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes at a time, among which GPUs and cores are shared out.")
    ] = 1,
    group: Annotated[str | None, typer.Option(hidden=True, help="Of --jobs: the label of one group.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run the steps of a file: dump, train in stages, eval, report; and all its variations and seeds.

    Example: cachekd run examples/easy_vqa/pipeline.yaml

    Repeated, the same command skips finished steps and resumes those that were cut short. It redoes steps
    that changed in the file or on the disk, and every step that takes their output. Earlier output is moved
    to NAME.old-1. The file is described in docs/how-to/pipelines.md.
    """
    from cachekd.pipeline import expand, read_pipeline
    from cachekd.pipeline.select import choose, labels_of, require_varying

    whole = expand(read_pipeline(pipeline))  # a mistake in the file is said before torch is loaded
    if only or variant is not None or jobs > 1:
        require_varying(whole)
    points = choose(whole, only or [], variant)
    if group is not None and group not in whole.groups:
        raise CachekdError("no step of this file is done there", where="--group", found=group)
    labels = labels_of(points) if group is None else {group}
    several = whole.varies and group is None
    quiet_libraries()  # before anything imports bitsandbytes, which speaks
    from cachekd.pipeline.sweep import Board, SomeFailed, run_sweep

    def show() -> None:
        states = Board(whole).look(labels)
        if not several:
            flat = [one for found in states.values() for one in found]
            words = partial(print_states, title=f"pipeline {whole.pipeline.out}")
            print_result(as_json, flat, words, lambda states: [state.to_dict() for state in states])
        else:
            words = partial(print_points, whole, points)
            print_result(as_json, states, words, partial(points_for_scripts, whole, points))

    go_on = "the same command goes on from here; what is finished stays"
    with stopping_in_order(lambda stop: f"{str(stop) or 'stopped'}: {go_on}"):
        try:
            if jobs > 1 and not status:
                run_jobs(whole, pipeline, jobs, announce_run, labels)
            elif not status:
                run_sweep(whole, runners(quiet=as_json or several), announce, announce_run, labels)
        except SomeFailed:
            show()
            raise
        show()


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
        "eval": then(evaluate.run_eval, evaluate.print_scores),
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


def announce_run(line: str) -> None:
    """Say how far a pipeline is that varies."""
    say(line, errors, style="bold")


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
