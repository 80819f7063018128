"""Several steps in one file: dump, train in stages, evaluate, report; what is finished is not done twice."""

from typing import TYPE_CHECKING, Any

from cachekd.pipeline.config import PipelineConfig, read_pipeline
from cachekd.pipeline.plan import PlannedStep, plan_steps
from cachekd.pipeline.vary import Group, Point, Sweep, expand

if TYPE_CHECKING:
    from cachekd.pipeline.state import StepState
    from cachekd.pipeline.sweep import look, run_pipeline


__all__ = [
    "Group",
    "PipelineConfig",
    "PlannedStep",
    "Point",
    "StepState",
    "Sweep",
    "expand",
    "look",
    "plan_steps",
    "read_pipeline",
    "run_pipeline",
]


def __getattr__(name: str) -> Any:
    """What needs torch, on first use: a mistake in the file is said before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cachekd.pipeline import sweep

    return getattr(sweep, name)
