"""A turn's fields beside its role and its content: heeded, or refused by name.

Fields that no chat template looks at (ids, timestamps, sources) are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cachekd.errors import BadSample

# Whether a turn is supervised; the value is what "yes" says. `supervised` is how `cachekd export` writes it.
SUPERVISION_FIELDS = {
    **dict.fromkeys(("loss", "train", "trainable", "weight", "supervised"), True),
    **dict.fromkeys(("mask", "masked"), False),
}
# What templates may write of a turn beside its content.
KEPT_FIELDS = ("name", "tool_call_id")

_CALL = "write the call into the turn's text, as the chat template writes it, and leave this field out"
_THINKING = "write the thinking into the answer's text, as the chat template writes it (<think>...</think>)"
IMAGES_BESIDE = 'put the images into the record\'s "images", and <image> where each stands'
_FINER = 'supervise whole turns: "loss": true or false'
MEDIA_FIX = "cachekd reads text and images; leave such samples out"
REFUSED_FIELDS = {
    **dict.fromkeys(("tool_calls", "function_call"), _CALL),
    **dict.fromkeys(("reasoning_content", "thinking", "reasoning"), _THINKING),
    **dict.fromkeys(("image", "images"), IMAGES_BESIDE),
    **dict.fromkeys(("loss_mask", "loss_scale", "loss_weight", "train_detail", "training"), _FINER),
}
MEDIA_FIELDS = ("video", "videos", "audio", "audios")
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
# Hardly a turn has one of these, and a mix has millions of turns.
_HEEDED = frozenset((*SUPERVISION_FIELDS, *KEPT_FIELDS))
_REFUSED = frozenset((*REFUSED_FIELDS, *MEDIA_FIELDS))


def is_given(value: Any) -> bool:
    """Whether a field says anything: tables fill what a row lacks with null, or with a struct of nulls."""
    if isinstance(value, Mapping):
        return any(inner is not None for inner in value.values())
    return value is not None and not (isinstance(value, str | bytes | list | tuple) and len(value) == 0)


def message_fields(turn: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """What a message has beside role and content: `supervised` where it is an answer that is not, and those
    of KEPT_FIELDS that are given.

    Raises:
        BadSample: one of these has a value that cannot be followed.
    """
    if _HEEDED.isdisjoint(turn):
        return {}
    kept = {name: turn[name] for name in KEPT_FIELDS if is_given(turn.get(name))}
    for name, value in kept.items():
        if not isinstance(value, str):
            raise BadSample(f'a turn\'s "{name}" is not text', where=where, found=repr(value)[:120])
    return kept if _is_supervised(turn, role, where) else {**kept, "supervised": False}


def refuse_fields(turn: Mapping[str, Any], where: str) -> None:
    """Refuse what would change the turn and cannot be followed.

    Raises:
        BadSample: it has a field of REFUSED_FIELDS or MEDIA_FIELDS, or the role of a call.
    """
    if not _REFUSED.isdisjoint(turn):
        for name, fix in REFUSED_FIELDS.items():
            if is_given(turn.get(name)):
                raise BadSample(
                    f'a turn has "{name}", which is not read',
                    where=where,
                    found=repr(turn[name])[:120],
                    fix=fix,
                )
        refuse_media(turn, where, "a turn")
    role = turn.get("from") or turn.get("role")
    if role in _CALL_ROLES:
        raise BadSample(
            f"a turn is a {role}, which is not read",
            where=where,
            expected="an assistant's turn with the call in its text",
            fix="make it the assistant's, with the call in its text as the chat template writes it",
        )


def refuse_media(fields: Mapping[str, Any], where: str, what: str) -> None:
    """Refuse a record or a turn with video or audio.

    Raises:
        BadSample: it has some.
    """
    for name in MEDIA_FIELDS:
        if is_given(fields.get(name)):
            raise BadSample(
                f'{what} has "{name}", which is not read',
                where=where,
                expected="text and images",
                found=repr(fields[name])[:120],
                fix=MEDIA_FIX,
            )


def _is_supervised(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """False for an assistant's turn that is context; what others are is not asked."""
    said = {
        name: _yes_or_no(name, turn[name], where) is yes
        for name, yes in SUPERVISION_FIELDS.items()
        if turn.get(name) is not None
    }
    if len(set(said.values())) > 1:
        raise BadSample(
            "a turn's fields contradict each other about its supervision",
            where=where,
            found=", ".join(f'"{name}": {turn[name]!r}' for name in said),
            fix="keep one of them",
        )
    supervised = next(iter(said.values()), True)
    if role != "assistant" and said and supervised:
        raise BadSample(
            f"a turn that is not the assistant's cannot be supervised, but has {', '.join(said)}",
            where=where,
            found=f"{role}: {next(iter(said))} is {turn[next(iter(said))]!r}",
            fix="leave the field out there",
        )
    return supervised or role != "assistant"


def _yes_or_no(name: str, value: Any, where: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise BadSample(
        f'a turn\'s "{name}" cannot be followed',
        where=where,
        expected="true or false, 1 or 0: a turn is supervised or it is context",
        found=repr(value)[:120],
        fix="make it one of these, or leave it out",
    )
