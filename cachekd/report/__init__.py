"""One self-contained HTML page about a run: is the student good, how did it get there, on what cache."""

from cachekd.report.page import build_report, write_report
from cachekd.report.runs import Run, read_run

__all__ = ["Run", "build_report", "read_run", "write_report"]
