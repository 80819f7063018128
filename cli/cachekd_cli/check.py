"""`cachekd check`: does the pair fit, before anything long starts?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.text import Text

from cachekd.config import CheckConfig
from cachekd_cli.console import (
    console,
    errors,
    print_result,
    printable,
    quiet_libraries,
    say,
    table,
    visible,
)
from cachekd_cli.options import AsJson, takes

if TYPE_CHECKING:
    from cachekd.check import PairReport, Run, Sizes, StepSizes


_STATES = {"ok": "green", "note": "yellow", "refused": "bold red"}
_COLOURS = {"image": "cyan", "context": "dim", "supervised": "bold green"}
_PARTS = {"vision_encoder": "vision encoder", "projector": "projector", "language_model": "language model"}


@takes(CheckConfig)
def check_command(config: CheckConfig, as_json: AsJson = False) -> None:
    """Check teacher, student and data against each other, and show what is supervised.

    Everything that does not fit is shown, not only the first problem. The exit code is 2 if something would
    be refused later. Without --forward no weights are read. --config also takes the file of a dump or of a
    run.

    Example: cachekd check --teacher models/llava-7b --student models/llava-0.5b --data data/train
    """
    quiet_libraries()
    from cachekd.check import check_pair

    with errors.status("looking at models and data", spinner="dots"):
        report = check_pair(config)
    print_result(as_json, report, print_report, lambda found: {**vars(found), "fits": found.fits})
    if not report.fits:
        raise typer.Exit(2)


def print_report(report: PairReport) -> None:
    """Print samples in colour, sizes, what fits and what does not, and the verdict."""
    for key, runs in report.previews:
        console.rule(Text(f"sample {visible(key)}"), align="left", style="dim")
        say(coloured(runs))
    console.print(
        Text("supervised", style=_COLOURS["supervised"]),
        Text("told", style=_COLOURS["context"]),
        Text("image", style=_COLOURS["image"]),
    )
    console.print(sizes_table(report.sizes))
    if report.step is not None:
        console.print(step_table(report.step))
    rows = ((row.name, Text(row.state, _STATES[row.state]), row.text, row.fix or "") for row in report.rows)
    columns = ("", "", "found", "what to do")
    console.print(table("teacher, student and data", columns, rows, texts=len(columns)))
    console.print(
        "[green]they fit[/]" if report.fits else "[bold red]they do not fit[/]: training would be refused"
    )


def coloured(runs: list[Run]) -> Text:
    """Colour a sample's tokens by whether they are supervised; an image is shown as <image x 576>."""
    text = Text()
    for run in runs:
        shown = f"{run.text.rstrip('>')} x {run.tokens}>" if run.kind == "image" else run.text
        text.append(printable(shown), style=_COLOURS[run.kind])
    return text


def sizes_table(sizes: Sizes) -> object:
    """A table of parameters by part, and of bytes in training."""
    rows = [
        (title, *(f"{counts[part] / 1e6:,.1f} M" for counts in (sizes.teacher, sizes.student)))  # type: ignore[index]
        for part, title in _PARTS.items()
    ]
    memory = (sizes.teacher_bytes, sizes.student_bytes)
    rows.append(("memory, without activations", *(f"{size / 1e9:,.2f} GB" for size in memory)))
    return table("parameters (the teacher's vision encoder is not loaded)", ("", "teacher", "student"), rows)


def step_table(step: StepSizes) -> object:
    """A table of a training step's memory by part."""
    from cachekd.check.memory import PART_NAMES

    rows = [
        (title, *(f"{getattr(memory, part) / 1e9:,.2f} GB" for memory in (step.kept, step.recomputed)))
        for part, title in PART_NAMES.items()
    ]
    how = ", ".join(said for said in (f"in {step.half or 'float32'}", step.how) if said)
    title = f"a training step of {step.batch_size} samples of {step.tokens:,} tokens, {how}: computed"
    return table(title, ("", "", "--gradient-checkpointing"), rows)
