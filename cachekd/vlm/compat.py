"""Can this student be switched into this teacher? Checked before anything runs."""

from __future__ import annotations

from typing import Any

from cachekd.errors import CachekdError
from cachekd.fingerprint import tokenizer_fingerprint


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
    """
    facts = {
        "model_type": (teacher.model_type, student.model_type),
        "vision width": (teacher.vision_config.hidden_size, student.vision_config.hidden_size),
        "image tokens": (_image_tokens(teacher), _image_tokens(student)),
        "vision_feature_layer": (teacher.vision_feature_layer, student.vision_feature_layer),
        "vision_feature_select_strategy": (
            teacher.vision_feature_select_strategy,
            student.vision_feature_select_strategy,
        ),
        "image_token_id": (teacher.image_token_id, student.image_token_id),
    }
    for name, (expected, found) in facts.items():
        if expected != found:
            raise CachekdError(
                "the student's visual features cannot be switched into the teacher",
                where=f"{name} of {student.name_or_path}",
                expected=f"{expected}, as {teacher.name_or_path} has it",
                found=found,
                fix="use a student whose vision encoder has the teacher's width and grid, "
                "or train with --lambda-vsd 0",
            )


def _image_tokens(config: Any) -> int:
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2
