"""Self-contained HTML pages: of a run beside others, of a cache, of its samples token by token."""

from cachekd.report.pages import build_report, write_report
from cachekd.report.runs import Run, read_run

__all__ = ["Run", "build_report", "read_run", "write_report"]
