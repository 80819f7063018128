"""The settings of a report."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from cachekd.config.base import Config
from cachekd.paths import LocalPath, PathOrName


class ReportConfig(Config):
    """One HTML page about a run."""

    FREE: ClassVar = frozenset({"out"})

    run: PathOrName = Field(
        description="a run's folder; in a pipeline a train step, by default the last one above"
    )
    baselines: list[PathOrName] = Field(
        [],
        description="another run, or a train step of the pipeline, to compare with; repeat the option for "
        "several",
    )
    out: LocalPath | None = Field(
        None, description="the page's file; by default report.html in the run's folder"
    )
