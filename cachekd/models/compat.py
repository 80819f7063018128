"""What two models must share for the switch, and what both allow of a sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cachekd.config.fields import TooLong
from cachekd.data.limits import MAX_TOKENS, Limits
from cachekd.errors import CachekdError
from cachekd.losses.terms import WITHOUT_SWITCH
from cachekd.models.families import GRID, Family, family_of, vision_tower_name
from cachekd.models.fingerprint import tokenizer_fingerprint

_SHOWN = 3  # tokens that differ
OTHER_TOWER = "use a student whose vision encoder has the teacher's width and grid"
# transformers maps older names (`n_positions`, ...) to the first; MPT alone has another. A scaled RoPE's is
# the scaled one; a model without positions (Bloom, Mamba) has none.
_CONTEXT = ("max_position_embeddings", "max_seq_len")


def check_tokenizers(teacher: Any, student: Any, *, instead: str = "") -> None:
    """Refuse different tokenizers: their distributions are over different things.

    Padded vocabularies are no difference: the models' embeddings may have rows that no token uses.

    Args:
        instead: what else would help; it comes first.

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
            fix=f"{instead}choose a student of the teacher's family, or give it the teacher's tokenizer",
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


def check_switch(
    teacher: Any, student: Any, *, bridged: frozenset[str] = frozenset(), own_text: bool = False
) -> None:
    """Refuse a student whose visual features the teacher's projector cannot take.

    Args:
        teacher: the teacher's config.
        student: the student's config.
        bridged: settings that may differ, as a bridge sees to them (`plan_bridge`).
        own_text: as for `switch_differences`.

    Raises:
        CachekdError: another family, or one of the facts that the family says must agree differs.
    """
    for difference in switch_differences(teacher, student, own_text=own_text):
        if difference.setting in bridged:
            continue
        raise CachekdError(
            "the student's visual features cannot be switched into the teacher",
            where=f"{difference.name} of {student.name_or_path}",
            expected=f"{difference.teacher}, as {teacher.name_or_path} has it",
            found=difference.student,
            fix=f"{OTHER_TOWER}, or {WITHOUT_SWITCH}"
            + ("" if bridged else "; --switch-bridge linear mends another width, and often another grid"),
        )


def switch_differences(teacher: Any, student: Any, *, own_text: bool = False) -> list[SwitchDifference]:
    """Every fact that stands between the student's features and the teacher's projector.

    Args:
        teacher, student: configs.
        own_text: the teacher reads a sample's text by its own tokenizer: its placeholder of an image may be
            another than the student's.

    Raises:
        CachekdError: the teacher is a language model.
    """
    vision_tower_name(teacher)  # a language model has none
    family = family_of(teacher)
    placeholder = () if own_text else ("image_token_id",)
    # Two names of one entry (Idefics3, SmolVLM) are the same code between V and P.
    kind = () if family_of(student) is family else ("model_type",)
    names = (*kind, width_setting(teacher), *family.shared, *placeholder)
    found = [
        SwitchDifference(_meaning(name, family), name, _setting(teacher, name), _setting(student, name))
        for name in names
    ]
    for name in family.equally_many:
        taps = (len(_setting(config, name) or ()) for config in (teacher, student))
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


def limits_of(
    configs: Iterable[Any], *, max_tokens: int | None = None, too_long: TooLong = "error"
) -> Limits:
    """The limits of the models that are to read the same samples.

    Args:
        configs: of `load_config`.
        max_tokens: lowers the models' own limit; it never raises it.
        too_long: what becomes of a longer sample, see `Limits`.
    """
    contexts: dict[str, int] = {} if max_tokens is None else {MAX_TOKENS: max_tokens}
    rows: dict[str, int] = {}
    for config in configs:
        text, name = config.get_text_config(), str(config.name_or_path)
        found = next((n for field in _CONTEXT if (n := getattr(text, field, None))), None)
        if found is not None:
            contexts[f"the context of {name}"] = found
        if getattr(text, "vocab_size", None):
            rows[name] = text.vocab_size
    shortest, fewest = (min(found, key=found.__getitem__, default=None) for found in (contexts, rows))
    return Limits(
        max_tokens=contexts.get(shortest or ""),
        max_tokens_of=shortest or MAX_TOKENS,
        too_long=too_long,
        embedding_rows=rows.get(fewest or ""),
        embedding_rows_of=fewest or "the model",
    )
