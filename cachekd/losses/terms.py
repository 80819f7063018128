"""The loss's terms, in one table: training, logs, evaluations, the command line and reports follow it.

To add one, write its function in a file of its own and its entry here; its weight is a line in `TrainConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from cachekd.losses.baselines import cross_entropy_loss
from cachekd.losses.dbild import dbild_loss

if TYPE_CHECKING:
    from cachekd.targets import TeacherTargets


@dataclass(frozen=True)
class DistilSettings:
    """How logits are compared with a teacher's.

    Attributes:
        temperature: by which both are divided.
        window, min_k: Kneedle's, as the teacher's targets have them.
    """

    temperature: float
    window: int = 128
    min_k: int = 2


@dataclass(frozen=True)
class Term:
    """A summand of the loss. Its weight is the setting `lambda_<name>`, but L_CE's, which is 1.

    Attributes:
        label: in formulas, for people.
        about: what it compares, for people.
        loss: ([n, V] logits, the targets of these n answer tokens, settings) to a sum over them, a scalar.
            Targets are `TeacherTargets`, and V is their vocabulary; or the token ids [n] where none teaches.
        path: whose logits they are: the student's own; or those of the switched path, which the teacher's
            language model makes of the student's visual features.
        taught: whether it needs a teacher; answer tokens without one are then none of its.
    """

    label: str
    about: str
    loss: Callable[[Tensor, Any, DistilSettings], Tensor]
    path: Literal["own", "switched"] = "own"
    taught: bool = True


def _cross_entropy(logits: Tensor, token_ids: Tensor, _: DistilSettings) -> Tensor:
    return cross_entropy_loss(logits, token_ids, reduction="sum")


def _dbild(logits: Tensor, targets: TeacherTargets, how: DistilSettings) -> Tensor:
    return dbild_loss(
        logits,
        targets,
        temperature=how.temperature,
        window=how.window,
        min_k=how.min_k,
        reduction="sum",
    )


# By the names in logs, records and settings.
TERMS = {
    "ce": Term("L_CE", "cross-entropy with the true answer", _cross_entropy, taught=False),
    "align": Term("L_Align", "the student's logits against the teacher's", _dbild),
    "vsd": Term(
        "L_VSD",
        "the same for the student's visual features, switched into the teacher",
        _dbild,
        path="switched",
    ),
}
