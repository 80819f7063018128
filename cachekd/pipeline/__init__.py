"""Several steps in one file: dump, train in stages, evaluate, report; what is finished is not done twice."""

from cachekd.pipeline.config import PipelineConfig, read_pipeline
from cachekd.pipeline.plan import PlannedStep, plan_steps
from cachekd.pipeline.run import look, run_pipeline
from cachekd.pipeline.state import StepState

__all__ = [
    "PipelineConfig",
    "PlannedStep",
    "StepState",
    "look",
    "plan_steps",
    "read_pipeline",
    "run_pipeline",
]
