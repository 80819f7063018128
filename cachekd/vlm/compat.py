"""Can this student be switched into this teacher? Checked before anything runs."""

from __future__ import annotations

from typing import Any

from cachekd.errors import CachekdError
from cachekd.fingerprint import tokenizer_fingerprint
from cachekd.vlm.families import Family, family_of, vision_tower_name
from cachekd.vlm.families.llava import GRID


def check_tokenizers(teacher: Any, student: Any) -> None:
    """Refuse different tokenizers: their distributions are over different things.

    Padded vocabularies are no difference: the models' embeddings may have rows that no token uses.
    """
    if tokenizer_fingerprint(teacher) == tokenizer_fingerprint(student):
        return
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    example = next((token for token in theirs if ours.get(token) != theirs[token]), None)
    found = f"{len(theirs):,} tokens in the teacher's, {len(ours):,} in the student's"
    if example is not None:
        found += f"; {example!r} is {theirs[example]} for the teacher and {ours.get(example)} for the student"
    raise CachekdError(
        "teacher and student have different tokenizers",
        where=f"{teacher.name_or_path} and {student.name_or_path}",
        expected="the same tokens with the same ids and the same splitting rules",
        found=found,
        fix="choose a student of the teacher's family, or give it the teacher's tokenizer",
    )


def check_switch(teacher: Any, student: Any) -> None:
    """Refuse a student whose visual features the teacher's projector cannot take.

    Args:
        teacher: the teacher's config.
        student: the student's config.

    Raises:
        CachekdError: another family, or one of the facts that the family says must agree differs.
    """
    vision_tower_name(teacher)  # a language model has none
    family = family_of(teacher)
    names = ("model_type", f"vision_config.{family.width}", *family.shared, "image_token_id")
    for name in names:
        expected, found = _setting(teacher, name), _setting(student, name)
        if expected != found:
            raise CachekdError(
                "the student's visual features cannot be switched into the teacher",
                where=f"{_meaning(name, family)} of {student.name_or_path}",
                expected=f"{expected}, as {teacher.name_or_path} has it",
                found=found,
                fix="use a student whose vision encoder has the teacher's width and grid, "
                "or train with --lambda-vsd 0",
            )


def _meaning(name: str, family: Family) -> str:
    if name == f"vision_config.{family.width}":
        return f"vision width ({name})"
    return f"image tokens ({name})" if name in GRID else name


def _setting(config: Any, name: str) -> Any:
    """A dotted attribute of a config; None where it is not set."""
    for part in name.split("."):
        config = getattr(config, part, None)
    return list(config) if isinstance(config, tuple) else config
