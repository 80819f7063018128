"""How long a sample is, about, from its text alone: for batches of samples of similar length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.errors import BadSample
from cachekd.samples.conversation import IMAGE_PLACEHOLDER, first_given
from cachekd.samples.encode import SampleEncoder
from cachekd.samples.protocol import Samples
from cachekd.samples.records import IMAGE_FIELDS, TURN_FIELDS

_AT_A_TIME = 1024  # texts per call of the tokenizer
_MEASURED = 16  # samples that are encoded as a whole
_TRIED = 256  # to find these among bad ones
_UNREADABLE = 0  # the length of a sample whose record cannot be read; others have at least a token


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
    """About how many tokens each sample has, in the data set's order, whatever the encoder's limits are.

    The text's tokens are counted. What turns and images add is fitted to a few samples at random, the only
    ones whose images are read; so lengths are next to exact where every image has the same number of
    tokens, and miss the differences where that depends on its size.

    Returns:
        of each sample; 0 where its record cannot be read.

    Raises:
        BadSample: none of many samples can be used.
        CachekdError: the data set cannot be read.
    """
    added = _fitted(samples, encoder.without_limits())
    lengths: list[int] = []
    for start in range(0, len(samples), _AT_A_TIME):
        indices = range(start, min(start + _AT_A_TIME, len(samples)))
        outlines = [_outline(samples, index) for index in indices]
        there = [outline for outline in outlines if outline is not None]
        found = iter(_text_tokens(there, encoder) + np.rint(_features(there) @ added).astype(int))
        lengths += [_UNREADABLE if outline is None else max(1, int(next(found))) for outline in outlines]
    return lengths


def _outline(samples: Samples, index: int) -> Outline | None:
    try:
        return samples.outline(index)
    except BadSample:  # which shows when it is read
        return None


def _fitted(samples: Samples, encoder: SampleEncoder) -> NDArray[np.floating[Any]]:
    """Tokens that come on top of the text's: in every sample, per turn, per image."""
    # At random, not evenly spread: data sets have periods.
    some = np.random.default_rng(0).choice(len(samples), min(_TRIED, len(samples)), replace=False).tolist()
    outlines: list[Outline] = []
    lengths: list[int] = []
    for index in some:
        try:
            outline, length = samples.outline(index), len(encoder(samples[index]))
        except BadSample:
            if not lengths and index == some[-1]:
                raise
            continue
        outlines.append(outline)
        lengths.append(length)
        if len(lengths) == _MEASURED:
            break
    rest = np.array(lengths) - _text_tokens(outlines, encoder)
    return np.linalg.lstsq(_features(outlines), rest, rcond=None)[0]


def _features(outlines: list[Outline]) -> NDArray[np.float64]:
    """[N, 3]: one, turns, images."""
    return np.array([(1.0, len(outline.texts), outline.images) for outline in outlines]).reshape(-1, 3)


def _text_tokens(outlines: list[Outline], encoder: SampleEncoder) -> NDArray[np.int64]:
    """[N], the tokens of each one's texts."""
    texts = ["\n".join(outline.texts) for outline in outlines]
    # Not by transformers' own call, which makes lists of everything: half the time.
    encoded = encoder.processor.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.array([len(some) for some in encoded], np.int64)
