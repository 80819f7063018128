"""Can this student be switched into this teacher? Checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cachekd.errors import CachekdError
from cachekd.fingerprint import tokenizer_fingerprint
from cachekd.vlm.families import GRID, Family, family_of, vision_tower_name

_SHOWN = 3  # tokens that differ


def check_tokenizers(teacher: Any, student: Any) -> None:
    """Refuse different tokenizers: their distributions are over different things.

    Padded vocabularies are no difference: the models' embeddings may have rows that no token uses.

    Raises:
        CachekdError: the first tokens that differ.
    """
    difference = tokenizer_difference(teacher, student)
    if difference is not None:
        raise CachekdError(
            "teacher and student have different tokenizers",
            where=f"{teacher.name_or_path} and {student.name_or_path}",
            expected="the same tokens with the same ids and the same splitting rules",
            found=difference,
            fix="choose a student of the teacher's family, or give it the teacher's tokenizer",
        )


def tokenizer_difference(teacher: Any, student: Any) -> str | None:
    """How two tokenizers differ, with the first tokens by id that do; None where they are the same."""
    if tokenizer_fingerprint(teacher) == tokenizer_fingerprint(student):
        return None
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    parts = [f"{len(theirs):,} tokens in the teacher's, {len(ours):,} in the student's"]
    tokens = sorted(theirs, key=theirs.__getitem__) + sorted(ours.keys() - theirs, key=ours.__getitem__)
    differing = [token for token in tokens if ours.get(token) != theirs.get(token)]
    for token in differing[:_SHOWN]:
        where = ["not there" if ids.get(token) is None else str(ids[token]) for ids in (theirs, ours)]
        parts.append(f"{token!r} is {where[0]} for the teacher and {where[1]} for the student")
    if len(differing) > _SHOWN:
        parts.append(f"{len(differing) - _SHOWN:,} more differ")
    if not differing:
        parts.append("the same tokens and ids, but other merges or splitting rules")
    return "; ".join(parts)


@dataclass(frozen=True)
class SwitchDifference:
    """A fact on which teacher and student must agree for the switch, and do not.

    Attributes:
        name: what it is, for people.
        setting: where it stands in the config, dotted.
        teacher, student: what each has.
    """

    name: str
    setting: str
    teacher: Any
    student: Any


def check_switch(teacher: Any, student: Any, *, mended: frozenset[str] = frozenset()) -> None:
    """Refuse a student whose visual features the teacher's projector cannot take.

    Args:
        teacher: the teacher's config.
        student: the student's config.
        mended: settings that may differ, as a bridge sees to them (`plan_bridge`).

    Raises:
        CachekdError: another family, or one of the facts that the family says must agree differs.
    """
    for difference in switch_differences(teacher, student):
        if difference.setting in mended:
            continue
        raise CachekdError(
            "the student's visual features cannot be switched into the teacher",
            where=f"{difference.name} of {student.name_or_path}",
            expected=f"{difference.teacher}, as {teacher.name_or_path} has it",
            found=difference.student,
            fix="use a student whose vision encoder has the teacher's width and grid, or train with "
            "--lambda-vsd 0"
            + ("" if mended else "; `cachekd check` says whether --switch-bridge linear would do"),
        )


def switch_differences(teacher: Any, student: Any) -> list[SwitchDifference]:
    """Every fact that stands between the student's features and the teacher's projector.

    Args:
        teacher, student: configs.

    Raises:
        CachekdError: the teacher is a language model.
    """
    vision_tower_name(teacher)  # a language model has none
    family = family_of(teacher)
    names = ("model_type", width_setting(teacher), *family.shared, "image_token_id")
    found = [
        SwitchDifference(_meaning(name, family), name, _setting(teacher, name), _setting(student, name))
        for name in names
    ]
    for name in family.equally_many:
        taps = (len(_setting(config, name)) for config in (teacher, student))
        found.append(SwitchDifference(f"number of {name}", name, *taps))
    return [difference for difference in found if difference.teacher != difference.student]


def width_setting(config: Any) -> str:
    """Where a config has the width of V's output, dotted."""
    return f"vision_config.{family_of(config).width}"


def _meaning(name: str, family: Family) -> str:
    if name == f"vision_config.{family.width}":
        return f"vision width ({name})"
    return f"image tokens ({name})" if name in GRID else name


def _setting(config: Any, name: str) -> Any:
    """A dotted attribute of a config; None where it is not set."""
    for part in name.split("."):
        config = getattr(config, part, None)
    return list(config) if isinstance(config, tuple) else config
