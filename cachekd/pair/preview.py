"""A sample as the model reads it, with what is supervised."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from cachekd.data import Encoded

Kind = Literal["image", "context", "supervised"]


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind.

    Attributes:
        kind: an image's tokens, what the model is told, or what it is to say.
        tokens: how many.
        text: decoded with special tokens; for an image its token once.
    """

    kind: Kind
    tokens: int
    text: str


def preview(encoded: Encoded, tokenizer: Any, image_token_id: int | None) -> list[Run]:
    """The tokens of a sample in runs, from first to last.

    Args:
        image_token_id: the placeholder that an image is many of; None for a language model.
    """
    ids = encoded.inputs["input_ids"].tolist()
    kinds: list[Kind] = [
        "image" if token == image_token_id else "supervised" if supervised else "context"
        for token, supervised in zip(ids, encoded.supervised.tolist(), strict=True)
    ]
    runs = []
    for kind, group in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        shown = tokens[:1] if kind == "image" else tokens
        runs.append(Run(kind, len(tokens), tokenizer.decode(shown, skip_special_tokens=False)))
    return runs
