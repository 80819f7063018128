"""How large each term's gradient is at V_S, P_S and L_S. The training does not notice."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cachekd.errors import CachekdError
from cachekd.losses.terms import TERMS
from cachekd.models.parts import parameters_by_part
from cachekd.train.sums import BatchTerms
from cachekd.train.terms import LossTerms

if TYPE_CHECKING:
    from cachekd.train.trainer import SwitchKDTrainer

log = logging.getLogger(__name__)

LITTLE = 0.01  # of the largest weighted gradient: a term below it does next to nothing
ENTRIES = 5  # of the log, in which it has to stay there to be told of before the run ends


def gradient_name(term: str, part: str) -> str:
    """Name it as the log has it, such as gradient_align_vision_encoder."""
    return f"gradient_{term}_{part}"


class TermGradients:
    """The gradient of each term, once between two entries of the log: in the first batch that has the term.

    Every term is measured for itself, by one more backward through the graph of the step's own forward. No
    gradient is left at the parameters, and no random number is drawn.

    Args:
        terms: of the run.
    """

    def __init__(self, terms: LossTerms) -> None:
        self.terms = terms
        self._due = set(terms.names)
        self._sizes: dict[str, dict[str, Tensor]] = {}  # by term and part, since the last entry
        self._weights: dict[str, float] = {}
        self._shares: dict[str, list[float]] = {name: [] for name in terms.names}  # a number for each entry
        self._told: set[str] = set()

    @classmethod
    def of(cls, trainer: SwitchKDTrainer) -> TermGradients | None:
        """Measure in the first process; None in the others.

        Raises:
            CachekdError: weights are sharded, so that no process has a whole gradient; or the student is
                compiled.
        """
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if sharded or trainer.args.torch_compile:
            raise CachekdError(
                "the gradient of a single term is not known here",
                where="setting 'log_term_gradients'",
                expected="a student that is whole in every process, and not compiled",
                found="FSDP or DeepSpeed" if sharded else "torch_compile",
                fix="leave log_term_gradients out",
            )
        return cls(trainer.terms) if trainer.is_world_process_zero() else None

    def measures(self, names: Iterable[str]) -> bool:
        """Whether a batch with these terms is looked at, which takes more backwards."""
        return not self._due.isdisjoint(names)

    def measure(self, found: BatchTerms, weights: Mapping[str, float]) -> None:
        """Look at those terms of a batch that were not measured since the last entry.

        Args:
            found: with its graph; whatever is done to it next finds it as it was.
            weights: of the terms, in this step.
        """
        for name in sorted(self._due & found.terms.keys()):
            term = found.terms[name]
            if (tokens := found.divisors[name]) and term.requires_grad:
                self._due.remove(name)
                self._sizes[name], self._weights[name] = self._of(term / tokens), weights[name]

    def _of(self, term: Tensor) -> dict[str, Tensor]:
        """The L2 norm of its gradient by part; of those parts that it reaches."""
        parts = {
            part: [one for one in parameters.values() if one.requires_grad]
            for part, parameters in parameters_by_part(self.terms.vlm).items()
        }
        with torch.autocast(term.device.type, enabled=False):
            every = [one for some in parts.values() for one in some]
            found = iter(torch.autograd.grad(term, every, retain_graph=True, allow_unused=True))
        sizes: dict[str, Tensor] = {}
        for part, some in parts.items():
            norms = [each.float().norm() for each in (next(found) for _ in some) if each is not None]
            if norms:
                sizes[part] = torch.stack(norms).norm()
        return sizes

    def logged(self) -> dict[str, float]:
        """What was measured since the last entry, by the names in the log; each without its weight."""
        sizes = {name: {p: float(x) for p, x in of.items()} for name, of in self._sizes.items()}
        self._note(sizes)
        self._due, self._sizes = set(self.terms.names), {}
        return {gradient_name(name, part): x for name, of in sizes.items() for part, x in of.items()}

    def _note(self, sizes: Mapping[str, Mapping[str, float]]) -> None:
        """Tell of a term whose weighted gradient has stayed far below the largest one."""
        weighted = {
            name: {part: self._weights[name] * size for part, size in of.items()}
            for name, of in sizes.items()
        }
        for name, of in weighted.items():
            largest = {part: max(other.get(part, 0.0) for other in weighted.values()) for part in of}
            shares = [size / largest[part] for part, size in of.items() if largest[part]]
            self._shares[name].append(max(shares, default=0.0))
            if len(self._shares[name]) >= ENTRIES:
                self._tell(name, self._shares[name][-ENTRIES:])

    def end(self) -> None:
        """Tell of those that a run of few entries had no time for."""
        for name, shares in self._shares.items():
            if 0 < len(shares) < ENTRIES:
                self._tell(name, shares)

    def _tell(self, name: str, shares: list[float]) -> None:
        if name in self._told or max(shares) >= LITTLE:
            return
        self._told.add(name)
        log.warning(
            "%s does next to nothing: in %d log entries its weighted gradient was %.2g %% of the largest "
            "term's at the most, wherever it reaches%s",
            TERMS[name].label,
            len(shares),
            100 * max(shares),
            "" if name == "ce" else f". A larger lambda_{name} or another loss ({name}) would change that",
        )
