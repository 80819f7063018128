"""Which terms a run has, and with which loss each: read off its settings `lambda_<name>` and `<name>`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from pydantic import model_validator

from cachekd.config.base import Config
from cachekd.config.losses import LOSSES, DBiLD, Loss
from cachekd.config.weights import Schedule, highest
from cachekd.errors import CachekdError
from cachekd.losses.terms import TERMS, Term


class Terms(Config):
    """Settings of a run, among them the weight and the loss of each term.

    Raises:
        CachekdError: the least k of a DBiLD is more than its window.
    """

    @model_validator(mode="after")
    def _each_min_k_is_within_its_window(self) -> Self:
        for name, loss in self.dbilds.items():
            arguments = loss.arguments(dict(self))
            window, min_k = arguments.get("window"), arguments.get("min_k")
            if window is not None and min_k is not None and min_k > window:
                raise CachekdError(
                    f"the least k of {TERMS[name].label} is more than its window",
                    where=f"settings 'window', 'min_k' and {name!r}",
                    expected=f"min_k of at most {window}",
                    found=min_k,
                )
        return self

    @property
    def weights(self) -> dict[str, float | Schedule]:
        """The weight of each term in `TERMS`, its `lambda_<name>`; that of L_CE is 1."""
        return {name: 1.0 if name == "ce" else getattr(self, f"lambda_{name}") for name in TERMS}

    @property
    def losses(self) -> dict[str, Loss]:
        """The loss of each term that is on and needs a teacher."""
        return {name: getattr(self, name) for name in self.taught}

    @property
    def dbilds(self) -> dict[str, DBiLD]:
        """Those of them that are DBiLD: Kneedle's settings are theirs alone."""
        return {name: loss for name, loss in self.losses.items() if isinstance(loss, DBiLD)}

    def _on(self, which: Callable[[Term], bool] = lambda term: True) -> tuple[str, ...]:
        on = (name for name, weight in self.weights.items() if highest(weight) > 0)
        return tuple(name for name in on if which(TERMS[name]))

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms that are on, by their names in `TERMS`: whose weight is ever above 0."""
        return self._on()

    @property
    def taught(self) -> tuple[str, ...]:
        """The terms that are on and need a teacher; without one this is plain cross-entropy training."""
        return self._on(lambda term: term.taught)

    @property
    def switched(self) -> tuple[str, ...]:
        """The terms of the switched path that are on."""
        return self._on(lambda term: term.path == "switched")

    @property
    def distils(self) -> bool:
        """Whether any term that needs a teacher is on."""
        return bool(self.taught)

    @property
    def switches(self) -> bool:
        """Whether a term of the switched path is on."""
        return bool(self.switched)

    @property
    def idle(self) -> set[str]:
        """The settings that no term that is on asks for: whatever they say, the student is the same."""
        off = {name for name, term in TERMS.items() if term.taught and name not in self.taught}
        of_losses = {name for kind in LOSSES.values() for name in kind.model_fields} & type(
            self
        ).model_fields.keys()
        asked = {name for loss in self.losses.values() for name, value in loss if value is None}
        return off | (of_losses - asked) | (set() if self.switches else {"vsd_every"})
