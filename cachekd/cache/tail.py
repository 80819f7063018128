"""What a cache keeps of the logprobs that it does not store: nothing, a sketch, or a fine one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cachekd.errors import CachekdError

DEFAULT_TAIL = "bytes=64"
CALIBRATION_TOKENS = 16_384
# RMS error of a logit in nats, all axes together, below which live and cached gradients agree to 0.998.
EXACT_NOISE = 0.15


@dataclass(frozen=True)
class TailSetting:
    """`--tail`, read.

    Attributes:
        sketch: whether there is one.
        bytes: budget per token, from which the step is found.
        step: of the sketch's codes, nats.
        noise: for a sketch with neither, its RMS error in nats.
    """

    sketch: bool = True
    bytes: float | None = None
    step: float | None = None
    noise: float = EXACT_NOISE

    @classmethod
    def parse(cls, text: str) -> TailSetting:
        """From "none", "exact", "bytes=64" or "step=0.1".

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
