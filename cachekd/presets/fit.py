"""Which terms a pair can be trained with: what stands between the vision sides, and the tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cachekd.errors import CachekdError
from cachekd.models import plan_bridge
from cachekd.models.compat import switch_differences
from cachekd.models.families import TEXT_ONLY, family_of
from cachekd.presets.pairs import Switch


@dataclass(frozen=True)
class Fit:
    """What is on.

    Attributes:
        switch: how L_VSD fits; "none": it does not, and is off.
        why: of `switch`, for people.
        own_text: teacher and student read text in two ways, so that L_Align is computed over cells.
    """

    switch: Switch
    why: str
    own_text: bool


def fit_of(teacher: Any, student: Any, *, own_text: bool) -> Fit:
    """Ask what `cachekd check` asks.

    Args:
        teacher, student: configs.
        own_text: whether their tokenizers, chat templates or encodings differ.
    """
    if TEXT_ONLY in (family_of(teacher), family_of(student)):
        return Fit("none", "one of the two is a language model, which has no vision encoder", own_text)
    differences = switch_differences(teacher, student, own_text=own_text)
    if not differences:
        return Fit(
            "paper", "the student's vision side has the teacher's family, layer, width and grid", own_text
        )
    if teacher.model_type != student.model_type:  # all else follows from it
        differences = [one for one in differences if one.setting == "model_type"]
    found = "; ".join(
        f"{one.name}: {one.teacher} of the teacher, {one.student} of the student" for one in differences
    )
    try:
        plan = plan_bridge(teacher, student, own_text=own_text)
    except CachekdError:
        return Fit("none", found, own_text)
    return Fit("linear", f"{found}. A bridge mends it: {plan}", own_text)
