"""The loss's terms, in one table: training, logs, evaluations, the command line and reports follow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from cachekd.losses.baselines import cross_entropy_loss
from cachekd.losses.dbild import dbild_loss


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


_cross_entropy = partial(cross_entropy_loss, reduction="sum")
_dbild = partial(dbild_loss, reduction="sum")
_VSD = "the same for the student's visual features, switched into the teacher"

# By the names in logs, records and settings.
TERMS = {
    "ce": Term("L_CE", "cross-entropy with the true answer", _cross_entropy, taught=False),
    "align": Term("L_Align", "the student's logits against the teacher's", _dbild),
    "vsd": Term("L_VSD", _VSD, _dbild, path="switched"),
}
