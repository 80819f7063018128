"""The settings of `cachekd check`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from cachekd.config.base import Mistake, refusal
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

    _run: dict[str, Any] = PrivateAttr({})

    @model_validator(mode="wrap")
    @classmethod
    def _of_a_run(cls, values: Any, make: Callable[[Any], Self]) -> Self:
        """Take the file of a dump or of a run too. What only those have is passed over, but for what a run's
        memory depends on; a binding is refused, as its cache does not fit without it."""
        theirs = (DumpConfig.model_fields | TrainConfig.model_fields).keys() - cls.model_fields - {"binding"}
        if not isinstance(values, dict):
            return make(values)
        made = make({name: value for name, value in values.items() if name not in theirs})
        if theirs.isdisjoint(values.keys() - TrainConfig.model_fields.keys()):  # no dump's
            made._run.update({name: values[name] for name in values if name in theirs})
        return made

    @property
    def run(self) -> TrainConfig | None:
        """The run whose file this is, as far as it says how the student trains; None without one.

        Raises:
            CachekdError: a run would refuse what the file says.
        """
        if not self._run:
            return None
        both = {name: getattr(self, name) for name in ("teacher", "student", "data")}
        try:
            return TrainConfig(**{"out": "run"} | both | self._run)
        except ValidationError as error:
            mistakes = [Mistake.of(each, "the run's file", TrainConfig) for each in error.errors()]
        raise refusal(mistakes)
