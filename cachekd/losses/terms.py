"""The loss's terms, in one table: training, logs, evaluations, the command line and reports follow it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Term:
    """A summand of the loss. Its weight is the setting `lambda_<name>`; that of L_CE is 1. Where a teacher is
    needed, the loss is the setting `<name>`: one of `cachekd.config.losses.LOSSES`.

    Attributes:
        label: in formulas, for people.
        about: what it compares, for people.
        path: whose logits they are: the student's own; or those of the switched path, which the teacher's
            language model makes of the student's visual features.
        taught: whether it needs a teacher; answer tokens without one are then none of its.
    """

    label: str
    about: str
    path: Literal["own", "switched"] = "own"
    taught: bool = True


_VSD = "the same for the student's visual features, switched into the teacher"

# By the names in logs, records and settings.
TERMS = {
    "ce": Term("L_CE", "cross-entropy with the true answer", taught=False),
    "align": Term("L_Align", "the student's logits against the teacher's"),
    "vsd": Term("L_VSD", _VSD, path="switched"),
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
