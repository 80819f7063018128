"""The loss's terms, in one table: training, logs, evaluations, the command line and reports follow it.

The table is read wherever a run is planned, so torch is imported when a loss is computed, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Term:
    """A summand of the loss. Its weight is the setting `lambda_<name>`; that of L_CE is 1.

    Attributes:
        label: in formulas, for people.
        about: what it compares, for people.
        loss: its sum over n answer tokens, from their [n, V] logits and `TeacherTargets` of V tokens, with
            `temperature`, `window` and `min_k` by name; from logits and token ids [n] where none teaches.
        path: whose logits they are: the student's own; or those of the switched path, which the teacher's
            language model makes of the student's visual features.
        taught: whether it needs a teacher; answer tokens without one are then none of its.
    """

    label: str
    about: str
    loss: Callable[..., Tensor]
    path: Literal["own", "switched"] = "own"
    taught: bool = True


def _cross_entropy(logits: Tensor, token_ids: Tensor) -> Tensor:
    from cachekd.losses.baselines import cross_entropy_loss

    return cross_entropy_loss(logits, token_ids, reduction="sum")


def _dbild(logits: Tensor, targets: Any, **settings: Any) -> Tensor:
    from cachekd.losses.dbild import dbild_loss

    return dbild_loss(logits, targets, reduction="sum", **settings)


_VSD = "the same for the student's visual features, switched into the teacher"

# By the names in logs, records and settings.
TERMS = {
    "ce": Term("L_CE", "cross-entropy with the true answer", _cross_entropy, taught=False),
    "align": Term("L_Align", "the student's logits against the teacher's", _dbild),
    "vsd": Term("L_VSD", _VSD, _dbild, path="switched"),
}


def labels(names: Iterable[str]) -> str:
    """Name terms for people, as in "L_Align and L_VSD"."""
    return " and ".join(TERMS[name].label for name in names)


def options_off(names: Iterable[str]) -> str:
    """Write the options that turn terms off, as in "--lambda-align 0 --lambda-vsd 0"."""
    settings = (f"lambda_{name}" for name in names)
    return " ".join(f"--{setting} 0".replace("_", "-") for setting in settings)


WITHOUT_SWITCH = "train without the switched path: " + options_off(
    name for name, term in TERMS.items() if term.path == "switched"
)
