"""`cachekd report`: one HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachekd_cli.console import say


def report_command(
    run: Annotated[Path, typer.Argument(help="A run's folder, written by `cachekd train`.")],
    baseline: Annotated[
        list[Path] | None, typer.Option(help="Another run to compare with; can be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the page goes. Default: RUN/report.html.")] = None,
) -> None:
    """Write one self-contained HTML page: accuracies, loss curves by term, cache, configuration.

    Example: cachekd report runs/switch-kd --baseline runs/ce
    """
    from cachekd.report import write_report

    page = write_report(run, baseline or [], out)
    say(f"report: {page.resolve()}")
