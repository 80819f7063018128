"""What a cache keeps of the logprobs that it does not store: nothing, a sketch, or a fine one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cachekd.errors import CachekdError

# RMS error of a logit, all axes together. A budget buys no less, in nats: gradients agree to 0.998 there.
BUDGET_NOISE = 0.15
# `exact` has so much of the spread of a token's probable logits: losses agree to 5e-4.
EXACT_NOISE = 0.005
LEAST_NOISE = 1e-4  # nats; a teacher whose logits are all equal has no spread
LOGPROB_STEP, EXACT_LOGPROB_STEP = 1 / 16, 1 / 256  # nats


@dataclass(frozen=True)
class TailSetting:
    """`--tail`, read.

    Attributes:
        sketch: whether there is one.
        bytes: budget per token, from which the step is found.
        step: of the sketch's codes, nats. A sketch with neither is exact.
    """

    sketch: bool = True
    bytes: float | None = None
    step: float | None = None

    @property
    def exact(self) -> bool:
        """Whether a student must not be able to tell."""
        return self.sketch and self.bytes is None and self.step is None

    @property
    def logprob_step(self) -> float:
        """The step of the logprobs that are kept, nats: no sketch makes up for their rounding."""
        return EXACT_LOGPROB_STEP if self.exact else LOGPROB_STEP

    @classmethod
    def parse(cls, text: str) -> TailSetting:
        """Read "none", "exact", "bytes=64" or "step=0.1".

        Raises:
            CachekdError: anything else.
        """
        if text == "none":
            return cls(sketch=False)
        if text == "exact":
            return cls()
        match = re.fullmatch(r"(bytes|step)=(\d+(?:\.\d*)?|\.\d+)", text)
        if match is None or float(match[2]) <= 0:
            raise CachekdError(
                f"unknown tail {text!r}",
                where="setting 'tail'",
                expected="none, exact, bytes=64 (per answer token) or step=0.1 (nats)",
            )
        return cls(bytes=float(match[2])) if match[1] == "bytes" else cls(step=float(match[2]))
