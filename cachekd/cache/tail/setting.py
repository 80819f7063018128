"""What a cache keeps of the logprobs that it does not store, `--tail`, as one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cachekd.cache.tail.encoder import step_for
from cachekd.config.fields import TAIL_FORMS, split_tail
from cachekd.errors import CachekdError

# RMS error of a logit, all axes together. A budget buys no less, in nats: gradients agree to 0.998 there.
BUDGET_NOISE = 0.15
# `exact` has so much of the spread of a token's probable logits: losses agree to 5e-4.
EXACT_NOISE = 0.005
LEAST_NOISE = 1e-4  # nats; a teacher whose logits are all equal has no spread
LOGPROB_STEP, EXACT_LOGPROB_STEP = 1 / 16, 1 / 256  # nats


@dataclass(frozen=True)
class Codes:
    """The codes that a step is chosen for.

    Attributes:
        y: [n, C] float32, where calibration tokens lie along the sketch's axes, in units.
        unit: nats of a unit, that of `y` and of the step.
        least, most: units; the step lies between them.
        spread: nats, of a token's probable logits; None where codes that are there become coarser.
    """

    y: Tensor
    unit: float
    least: float
    most: float
    spread: float | None = None


@dataclass(frozen=True)
class TailCodec:
    """One way to keep the tail.

    Attributes:
        step: the step to which a sketch's codes are rounded, in units, from the number and the codes. None:
            there is no sketch, and the mass of the tail is spread evenly.
        exact: whether a student must not be able to tell.
    """

    step: Callable[[float, Codes], float] | None
    exact: bool = False


def with_noise(noise: float, codes: Codes) -> float:
    """The step at which a logit's RMS error is `noise` nats, over all axes together."""
    return noise * (12 / codes.y.shape[1]) ** 0.5 / codes.unit


def _none_that_shows(_number: float, codes: Codes) -> float:
    if codes.spread is None:
        return codes.least
    return with_noise(min(BUDGET_NOISE, max(LEAST_NOISE, EXACT_NOISE * codes.spread)), codes)


def _in_nats(step: float, codes: Codes) -> float:
    return step / codes.unit


def _within_budget(budget: float, codes: Codes) -> float:
    step = step_for(budget, codes.y, codes.least, codes.most)
    return step if codes.spread is None else max(with_noise(BUDGET_NOISE, codes), step)


# By the names in `TAIL_FORMS` (`cachekd.config.fields`), which says how each is written.
TAILS = {
    "none": TailCodec(None),
    "exact": TailCodec(_none_that_shows, exact=True),
    "bytes": TailCodec(_within_budget),
    "step": TailCodec(_in_nats),
}


@dataclass(frozen=True)
class TailSetting:
    """`--tail`, read.

    Attributes:
        name: of a codec in `TAILS`.
        number: what the codec is given; 0 where it takes none.
    """

    name: str
    number: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}={self.number:g}" if "=" in TAIL_FORMS[self.name] else self.name

    @property
    def sketch(self) -> bool:
        """Whether there is a sketch."""
        return TAILS[self.name].step is not None

    @property
    def exact(self) -> bool:
        """Whether a student must not be able to tell."""
        return TAILS[self.name].exact

    @property
    def logprob_step(self) -> float:
        """The step of the logprobs that are kept, nats: no sketch makes up for their rounding."""
        return EXACT_LOGPROB_STEP if self.exact else LOGPROB_STEP

    def step(self, codes: Codes) -> float:
        """The step to which a sketch's codes are rounded, in units of `codes`."""
        step = TAILS[self.name].step
        if step is None:
            raise ValueError(f"--tail {self.name} has no sketch")
        return step(self.number, codes)

    @classmethod
    def parse(cls, text: str) -> TailSetting:
        """Read "none", "exact", "bytes=64" or "step=0.1".

        Raises:
            CachekdError: it is no tail of the table, or its number is none above 0.
        """
        try:
            return cls(*split_tail(text))
        except ValueError:
            raise CachekdError(
                f"unknown tail {text!r}", where="setting 'tail'", expected=", ".join(TAIL_FORMS.values())
            ) from None
