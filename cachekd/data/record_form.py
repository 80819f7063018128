"""The form of a data record, written down for its JSON Schema; what reads records is `sample_from_record`.

A record may hold more than this: unknown fields are left alone, unless they look like a picture.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cachekd.data.turn_fields import MEDIA_FIELDS, REFUSED_FIELDS

Role = Literal["human", "user", "gpt", "assistant", "system", "tool", "observation"]
YesOrNo = bool | Literal[0, 1] | None
_NOTHING: dict[str, Any] = {"enum": [None, "", []]}


class TextPart(BaseModel):
    """Text within a turn; `<image>` in it stands for an image."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str
    index: None = None


class ImagePart(BaseModel):
    """Where an image stands; the image itself is in `images`. If one has an index, all have."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["image"]
    text: Literal["", None] = None
    index: int | None = Field(None, ge=0, description="which of the images it is; an image may come twice")


Content = str | list[TextPart | ImagePart]


def _refuse_in_turns(schema: dict[str, Any]) -> None:
    """Fields that change a turn, and cannot be heeded, must say nothing."""
    schema["properties"] |= {
        name: {"description": fix, **_NOTHING} for name, fix in REFUSED_FIELDS.items()
    } | dict.fromkeys(MEDIA_FIELDS, _NOTHING)


class Turn(BaseModel):
    """What a turn may say beside who speaks and what. Only answers are supervised, and all unless told."""

    model_config = ConfigDict(json_schema_extra=_refuse_in_turns)
    loss: YesOrNo = Field(None, description="false: an answer is context")
    train: YesOrNo = Field(None, description="likewise")
    trainable: YesOrNo = Field(None, description="likewise")
    weight: YesOrNo = Field(None, description="likewise; between 0 and 1 there is nothing")
    supervised: YesOrNo = Field(None, description="likewise, as `cachekd export` writes it")
    mask: YesOrNo = Field(None, description="true: an answer is context")
    masked: YesOrNo = Field(None, description="likewise")
    name: str | None = Field(None, description="for the chat template")
    tool_call_id: str | None = Field(None, description="for the chat template")


class LlavaTurn(Turn):
    """A turn as LLaVA writes it."""

    from_: Role = Field(
        alias="from",
        description="human and user are one, gpt and assistant are one, tool and observation are one",
    )
    value: Content


class Message(Turn):
    """A turn as chat templates take it."""

    role: Role
    content: Content


def _needs_turns(schema: dict[str, Any]) -> None:
    """One of the two, and not null: a data set's table fills what a row lacks with null.
    And no video or audio."""
    some = [
        {"required": [name], "properties": {name: {"type": "array"}}}
        for name in ("conversations", "messages")
    ]
    schema["anyOf"] = some
    schema["properties"] |= dict.fromkeys(MEDIA_FIELDS, _NOTHING)


class SampleRecord(BaseModel):
    """A record of the data, one image-text conversation.

    That is an entry of a LLaVA .json, a line of a .jsonl, the .json of a WebDataset sample, or a table's row.
    Where no turn has an `<image>`, the images come first in the first user turn; otherwise there are as many
    as images, or all are parts with an index. At least one turn is the assistant's and supervised; the
    assistant's texts are not empty. An image under another name is refused, unless --image-field takes it.
    """

    model_config = ConfigDict(json_schema_extra=_needs_turns)
    id: str | int | None = Field(
        None,
        description="the sample's key: without one the row's number, in tars the members' name; one that "
        "comes again gets #2, #3, ... behind it",
    )
    image: str | None = Field(
        None, description="the image's path from the file's folder; tars and tables hold it themselves"
    )
    images: str | list[str] | None = Field(None, description="likewise, several")
    conversations: list[LlavaTurn | Message] | None = Field(None, min_length=1)
    messages: list[LlavaTurn | Message] | None = Field(
        None, min_length=1, description="the same; used where there are no conversations"
    )
    system: str | None = Field(None, description="text of the first, system turn")
    system_prompt: str | None = Field(None, description="the same")
    tools: list[dict[str, Any]] | str | None = Field(
        None, description="for a chat template that takes them; or the JSON text of such a list"
    )
