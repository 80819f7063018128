"""The form of a data record, written down for its JSON Schema; what reads records is `sample_from_record`.

A record may hold more than this: unknown fields are left alone.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["human", "user", "gpt", "assistant", "system"]


class TextPart(BaseModel):
    """Text within a turn; `<image>` in it stands for an image."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str
    index: None = None


class ImagePart(BaseModel):
    """Where an image stands; the image itself is in `images`."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["image"]
    text: Literal["", None] = None
    index: int | None = None


Content = str | list[TextPart | ImagePart]


class LlavaTurn(BaseModel):
    """A turn as LLaVA writes it."""

    from_: Role = Field(alias="from", description="human and user are one, gpt and assistant are one")
    value: Content


class Message(BaseModel):
    """A turn as chat templates take it."""

    role: Role
    content: Content


def _needs_turns(schema: dict[str, Any]) -> None:
    """One of the two, and not null: a data set's table fills what a row lacks with null."""
    some = [
        {"required": [name], "properties": {name: {"type": "array"}}}
        for name in ("conversations", "messages")
    ]
    schema["anyOf"] = some


class SampleRecord(BaseModel):
    """A record of the data, one image-text conversation.

    That is an entry of a LLaVA .json, a line of a .jsonl, the .json of a WebDataset sample, or a table's row.
    Where no turn has an `<image>`, the images come first in the first user turn; otherwise there are as many
    as images. At least one turn is the assistant's, and its text is not empty.
    """

    model_config = ConfigDict(json_schema_extra=_needs_turns)
    id: str | int | None = Field(
        None, description="the sample's key, unique; in LLaVA files required, in tars the members' name"
    )
    image: str | None = Field(
        None, description="the image's path from the file's folder; tars and tables hold it themselves"
    )
    images: str | list[str] | None = Field(None, description="likewise, several")
    conversations: list[LlavaTurn | Message] | None = Field(None, min_length=1)
    messages: list[LlavaTurn | Message] | None = Field(
        None, min_length=1, description="the same; used where there are no conversations"
    )
