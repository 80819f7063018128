"""The weight of a term: a number, or a schedule over the optimizer's steps."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from cachekd.config.base import Config
from cachekd.config.fields import from_text


class Schedule(Config):
    """A weight that changes over a run. It depends on nothing but the number of the optimizer's step and how
    many there are: not on batches, processes, or at which step a run was resumed."""

    schedule: Literal["constant", "linear", "cosine"] = Field(
        description="the way from `start` to `end`: none, a straight line, or half a cosine wave"
    )
    start: float = Field(ge=0, description="the weight at first")
    end: float | None = Field(None, ge=0, description="the weight at last; of constant there is none")
    after: float = Field(
        0.0, ge=0, lt=1, description="share of the run's steps at `start`, before it changes"
    )
    over: float | None = Field(
        None, gt=0, le=1, description="share of the run's steps over which it changes; by default the rest"
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        changes = [name for name in ("end", "after", "over") if getattr(self, name)]
        if self.schedule == "constant" and changes:
            raise ValueError(f"a constant weight has no {', '.join(changes)}")
        if self.schedule != "constant" and self.end is None:
            raise ValueError(f"a {self.schedule} weight needs `end` beside `start`")
        if self.over is not None and self.after + self.over > 1 + 1e-9:
            raise ValueError(f"after {self.after:g} and over {self.over:g} are more than all steps, 1")
        return self

    def at(self, step: int, steps: int) -> float:
        """Return the weight at optimizer step `step` of `steps`, the first of which is 0."""
        if self.end is None:
            return self.start
        over = 1 - self.after if self.over is None else self.over
        progress = step / (steps - 1) if steps > 1 else 0.0
        way = min(1.0, max(0.0, (progress - self.after) / over))
        if self.schedule == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + way * (self.end - self.start)

    def __str__(self) -> str:
        """Write it for people, as in "linear 0 to 1"."""
        if self.end is None:
            return f"{self.start:g}"
        after = f" after {self.after:g}" * bool(self.after)
        over = "" if self.over is None else f" over {self.over:g}"
        return f"{self.schedule} {self.start:g} to {self.end:g}{after}{over}"


def weight_at(weight: float | Schedule, step: int, steps: int) -> float:
    """Return a term's weight at optimizer step `step` of `steps`, the first of which is 0."""
    return weight.at(step, steps) if isinstance(weight, Schedule) else weight


def highest(weight: float | Schedule) -> float:
    """Return the largest weight that a term ever has: it is on if that is above 0."""
    return max(weight.start, weight.end or 0.0) if isinstance(weight, Schedule) else weight


def written(weight: float | Schedule) -> str:
    """Write a weight for people."""
    return str(weight) if isinstance(weight, Schedule) else f"{weight:g}"


def _number_or_mapping(value: Any) -> Any:
    """What a weight may be; a mapping may be a text, as on the command line."""
    found = from_text(value)
    if not isinstance(found, dict | Schedule):
        try:
            float(found)
        except (TypeError, ValueError):
            raise ValueError(
                "a weight is a number, or a schedule: {schedule: linear, start: 0, end: 1}"
            ) from None
    return found


def _kind(value: Any) -> str:
    return "mapping" if isinstance(value, dict | Schedule) else "number"


Weight = Annotated[
    Annotated[Annotated[float, Field(ge=0)], Tag("number")] | Annotated[Schedule, Tag("mapping")],
    Discriminator(_kind),
    BeforeValidator(_number_or_mapping, json_schema_input_type=float | Schedule),
]
