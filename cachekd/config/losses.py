"""The losses that a term can have: the table of their names and settings.

Loss `x` is `x_loss` in `cachekd/losses/x.py`, which takes its settings by their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from cachekd.config.base import Config
from cachekd.config.fields import from_text
from cachekd.errors import did_you_mean, nearest

OF_THE_RUN = "by default the run's"


class Loss(Config):
    """The settings of a loss. One that is None is the run's own of that name, where it has one; else the
    function's default.

    Attributes:
        everywhere: whether the loss asks for the teacher's whole distribution.
    """

    everywhere: ClassVar[bool] = False

    loss: str

    def arguments(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the function is called with.

        Args:
            run: the run's own settings, those of no loss among them.
        """
        said = {name: getattr(self, name) for name in type(self).model_fields if name != "loss"}
        found = {name: run.get(name) if value is None else value for name, value in said.items()}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        """Write it for people, as in "dbild, direction teacher"; what is at its default is left out."""
        fields = type(self).model_fields.items()
        said = [(name, getattr(self, name)) for name, field in fields if getattr(self, name) != field.default]
        return ", ".join([self.loss, *(f"{name} {value}" for name, value in said)])


Temperature = Annotated[float | None, Field(gt=0, description=f"divides the logits; {OF_THE_RUN}")]


class DBiLD(Loss):
    """Reverse KL over pairwise differences of logits, Kneedle's k, both sides lead (Switch-KD)."""

    loss: Literal["dbild"] = "dbild"
    direction: Literal["both", "teacher", "student"] = Field(
        "both", description="whose largest logits are compared: each side's in turn, or one side's alone"
    )
    temperature: Temperature = None
    window: int | None = Field(
        None, ge=2, description=f"the most ids that Kneedle considers; {OF_THE_RUN}, else the cache's"
    )
    min_k: int | None = Field(None, ge=2, description=f"the least k; {OF_THE_RUN}, else the cache's")

    @model_validator(mode="after")
    def _fits_its_window(self) -> Self:
        if self.window is not None and self.min_k is not None and self.min_k > self.window:
            raise ValueError(f"min_k {self.min_k} is more than window {self.window}")
        return self

    @property
    def teacher_leads(self) -> bool:
        """Whether the teacher's own selection is asked for."""
        return self.direction != "student"


class BiLD(Loss):
    """Forward KL over pairwise differences of the k largest logits, both sides lead (arXiv 2406.13555)."""

    loss: Literal["bild"] = "bild"
    k: int = Field(8, ge=2, description="ids on each side; all pairs are formed")
    temperature: Temperature = None


class ForwardKL(Loss):
    """KL(p_T || p_S) over the whole vocabulary (Hinton et al., arXiv 1503.02531)."""

    everywhere = True
    loss: Literal["forward_kl"] = "forward_kl"
    temperature: Temperature = None


class ReverseKL(Loss):
    """KL(p_S || p_T) over the whole vocabulary (MiniLLM, arXiv 2306.08543)."""

    everywhere = True
    loss: Literal["reverse_kl"] = "reverse_kl"
    temperature: Temperature = None


class JSD(Loss):
    """The generalised Jensen-Shannon divergence over the whole vocabulary (GKD, arXiv 2306.13649)."""

    everywhere = True
    loss: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, gt=0, lt=1, description="the teacher's share of the mixture")
    temperature: Temperature = None


class TopKL(Loss):
    """KL(p_T || p_S) over the teacher's k most probable ids and one bucket for all the others."""

    loss: Literal["topk_kl"] = "topk_kl"
    k: int = Field(64, ge=1, description="the teacher's most probable ids")
    temperature: Temperature = None


class MSE(Loss):
    """The mean squared difference of centred logits over the whole vocabulary (arXiv 1312.6184)."""

    everywhere = True
    loss: Literal["mse"] = "mse"


# The table.
AnyLoss = DBiLD | BiLD | ForwardKL | ReverseKL | JSD | TopKL | MSE
LOSSES: dict[str, type[Loss]] = {kind.model_fields["loss"].default: kind for kind in get_args(AnyLoss)}


def _name_or_mapping(value: Any) -> Any:
    """A name is a loss with its defaults; a mapping may be a text, as on the command line."""
    found = from_text(value)
    if isinstance(found, Loss):
        return found
    name = found.get("loss") if isinstance(found, dict) else found
    if isinstance(name, str) and name in LOSSES:
        return {"loss": name} if found is name else found
    if name is None:
        raise ValueError(
            f"a loss needs its name: {{loss: {next(iter(LOSSES))}, ...}}, or {', '.join(LOSSES)}"
        )
    near = did_you_mean(nearest(str(name), LOSSES))
    hint = "" if near is None else f" ({near})"
    raise ValueError(f"no such loss, {str(name)!r}{hint}: it is {', '.join(LOSSES)}")


_Tagged = Annotated[AnyLoss, Field(discriminator="loss")]
TermLoss = Annotated[_Tagged, BeforeValidator(_name_or_mapping, json_schema_input_type=str | _Tagged)]
