"""How long a sample is, about, from its text alone: for batches of samples of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.samples.conversation import IMAGE_PLACEHOLDER, first_given
from cachekd.samples.encode import SampleEncoder
from cachekd.samples.protocol import Samples
from cachekd.samples.records import IMAGE_FIELDS, TURN_FIELDS

_AT_A_TIME = 1024  # texts per call of the tokenizer
_MEASURED = 16  # samples that are encoded as a whole


class Outline(NamedTuple):
    """A sample's turns and its number of images; no image has been opened for it."""

    texts: list[str]
    images: int


def outline_of_record(record: Mapping[str, Any]) -> Outline:
    """Of `{"image" or "images", "conversations" or "messages"}`; what the image fields hold is not looked at.

    What is wrong with a record shows when the sample is read; here it has no text.
    """
    turns = first_given(record, *TURN_FIELDS)
    if isinstance(turns, Mapping):  # of lists, as older `datasets` make of a list of mappings
        columns = first_given(turns, "value", "content")
        texts = [_text(value) for value in columns] if isinstance(columns, list) else []
    else:
        texts = [_text(turn) for turn in turns] if isinstance(turns, list) else []
    given = first_given(record, *IMAGE_FIELDS)
    images = len(given) if isinstance(given, list | tuple) else int(given is not None and given != "")
    return Outline([text.replace(IMAGE_PLACEHOLDER, "") for text in texts], images)


def _text(turn: Any) -> str:
    """Of a turn, its content, or one of its parts; an image is its placeholder."""
    if isinstance(turn, str):
        return turn
    if isinstance(turn, list):
        return "".join(_text(part) for part in turn)
    if not isinstance(turn, Mapping):
        return ""
    if turn.get("type") == "image":
        return IMAGE_PLACEHOLDER
    return _text(first_given(turn, "value", "content", "text"))


def rough_lengths(samples: Samples, encoder: SampleEncoder) -> list[int]:
    """About how many tokens each sample has, in the data set's order.

    The text's tokens are counted. What turns and images add is fitted to a few samples at random, the only
    ones whose images are read; so lengths are next to exact where every image has the same number of
    tokens, and miss the differences where that depends on its size.

    Raises:
        CachekdError: one of the few cannot be used, or the data set cannot be read.
    """
    added = _fitted(samples, encoder)
    lengths: list[int] = []
    for start in range(0, len(samples), _AT_A_TIME):
        indices = range(start, min(start + _AT_A_TIME, len(samples)))
        outlines = [samples.outline(index) for index in indices]
        for outline, tokens in zip(outlines, _text_tokens(outlines, encoder), strict=True):
            lengths.append(max(1, tokens + round(float(added @ _features(outline)))))
    return lengths


def _fitted(samples: Samples, encoder: SampleEncoder) -> NDArray[np.float64]:
    """Tokens that come on top of the text's: in every sample, per turn, per image."""
    count = min(_MEASURED, len(samples))
    # At random, not evenly spread: data sets have periods.
    some = np.random.default_rng(0).choice(len(samples), count, replace=False).tolist()
    outlines = [samples.outline(index) for index in some]
    texts = _text_tokens(outlines, encoder)
    rest = [len(encoder(samples[index])) - tokens for index, tokens in zip(some, texts, strict=True)]
    features = np.array([_features(outline) for outline in outlines])
    return np.linalg.lstsq(features, np.array(rest), rcond=None)[0]


def _features(outline: Outline) -> tuple[int, int, int]:
    return 1, len(outline.texts), outline.images


def _text_tokens(outlines: list[Outline], encoder: SampleEncoder) -> Iterator[int]:
    texts = ["\n".join(outline.texts) for outline in outlines]
    ids = encoder.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return (len(some) for some in ids)
