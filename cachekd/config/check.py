"""The settings of `cachekd check`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from cachekd.config.data import DataOptions
from cachekd.config.dump import DumpConfig
from cachekd.config.fields import CacheName, ModelName, SwitchBridge
from cachekd.config.train import TrainConfig


class CheckConfig(DataOptions):
    """Whether teacher, student, data and cache fit, before anything long starts."""

    teacher: ModelName
    student: ModelName
    cache: CacheName = None
    switch_bridge: SwitchBridge = None
    samples: int = Field(2, ge=1, description="samples to look at, and to show")
    forward: bool = Field(False, description="load both models and prove that each can be taken apart")

    @model_validator(mode="before")
    @classmethod
    def _of_a_run(cls, values: Any) -> Any:
        """Take the file of a dump or a run too. What only those have is passed over; a binding is refused, as
        its cache does not fit without it."""
        theirs = (DumpConfig.model_fields | TrainConfig.model_fields).keys() - cls.model_fields - {"binding"}
        return {n: v for n, v in values.items() if n not in theirs} if isinstance(values, dict) else values
