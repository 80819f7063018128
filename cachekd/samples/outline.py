"""How long a sample is, about, from its text alone: for batches of samples of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.samples.conversation import IMAGE_PLACEHOLDER, TURN_FIELDS, first_given
from cachekd.samples.encode import SampleEncoder
from cachekd.samples.image_fields import pictures_of
from cachekd.samples.protocol import Samples
from cachekd.samples.records import SYSTEM_FIELDS

_AT_A_TIME = 1024  # texts per call of the tokenizer
_MEASURED = 16  # samples that are encoded as a whole


class Outline(NamedTuple):
    """A sample's turns and its number of images; no image has been opened for it."""

    texts: list[str]
    images: int


def outline_of_record(record: Mapping[str, Any], image_fields: Sequence[str] = ()) -> Outline:
    """Of what `sample_from_record` takes; what the image fields hold is not looked at.

    The texts are those of the turns, of a system text and of tools beside them. What is wrong with a record
    shows when the sample is read; here it has no text.
    """
    contents = _contents(first_given(record, *TURN_FIELDS))
    try:
        texts = [_text(content) for content in contents]
        texts = [text.replace(IMAGE_PLACEHOLDER, "") for text in (*_texts_beside(record, texts), *texts)]
        return Outline(texts, _indexed(contents) or len(pictures_of(record, image_fields)))
    except RecursionError:  # lists in lists, hundreds deep
        return Outline([], 0)


def _contents(turns: Any) -> list[Any]:
    if isinstance(turns, Mapping):  # of lists, as older `datasets` make of a list of mappings
        turns = first_given(turns, "value", "content")
    if not isinstance(turns, list):
        return []
    return [first_given(turn, "value", "content") if isinstance(turn, Mapping) else turn for turn in turns]


def _texts_beside(record: Mapping[str, Any], texts: list[str]) -> Iterator[str]:
    """Of tools, and of a system text that is not among the turns."""
    if tools := record.get("tools"):
        yield str(tools)
    system = first_given(record, *SYSTEM_FIELDS)
    if isinstance(system, str) and system and system not in texts:
        yield system


def _indexed(contents: list[Any]) -> int:
    """How many parts say which image they are: an image may stand in several places."""
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(
        isinstance(part, Mapping) and part.get("type") == "image" and part.get("index") is not None
        for part in parts
    )


def _text(content: Any) -> str:
    """Of a turn's content, or of one of its parts; an image is its placeholder."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_text(part) for part in content)
    if not isinstance(content, Mapping):
        return ""
    if content.get("type") == "image":
        return IMAGE_PLACEHOLDER
    return _text(first_given(content, "value", "content", "text"))


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
