"""What a cache keeps of the logprobs that it does not store, `--tail`, as one table."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cachekd.cache.tail.encoder import step_for
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
        example: how it is asked for, with what its number is.
        step: the step to which a sketch's codes are rounded, in units, from the number and the codes. None:
            there is no sketch, and the mass of the tail is spread evenly.
        exact: whether a student must not be able to tell.
    """

    example: str
    step: Callable[[float, Codes], float] | None
    exact: bool = False

    @property
    def takes_number(self) -> bool:
        return "=" in self.example


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


TAILS = {
    "none": TailCodec("none", None),
    "exact": TailCodec("exact", _none_that_shows, exact=True),
    "bytes": TailCodec("bytes=64 (per answer token)", _within_budget),
    "step": TailCodec("step=0.1 (nats)", _in_nats),
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
        return f"{self.name}={self.number:g}" if TAILS[self.name].takes_number else self.name

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
        name, equals, number = text.partition("=")
        codec = TAILS.get(name)
        if codec is not None and codec.takes_number == bool(equals):
            if not equals:
                return cls(name)
            if re.fullmatch(r"\d+(?:\.\d*)?|\.\d+", number) and float(number) > 0:
                return cls(name, float(number))
        raise CachekdError(
            f"unknown tail {text!r}",
            where="setting 'tail'",
            expected=", ".join(codec.example for codec in TAILS.values()),
        )
