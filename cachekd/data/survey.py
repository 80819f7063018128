"""A whole data set, looked at without opening more than a few images: how long its samples are, about.

For batches of samples of similar length, and for `cachekd check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.data.conversation import IMAGE_PLACEHOLDER, ROLES, SYSTEM_FIELDS, TURN_FIELDS, first_given
from cachekd.data.encode import SampleEncoder
from cachekd.data.image_fields import pictures_of
from cachekd.data.sample import Preview, Samples
from cachekd.errors import BadSample


def preview_of_record(record: Mapping[str, Any], image_fields: Sequence[str] = ()) -> Preview:
    """Preview what `sample_from_record` takes; what the image fields hold is not looked at.

    The texts are those of the turns, of a system text and of tools beside them. What is wrong with a record
    shows when the sample is read; here it has no text.
    """
    turns = _turns(first_given(record, *TURN_FIELDS))
    contents = [content for _, content in turns]
    try:
        texts = [_text(content).replace(IMAGE_PLACEHOLDER, "") for content in contents]
        answered = _answered([ROLES.get(str(role)) for role, _ in turns], texts)
        images = _indexed(contents) or len(pictures_of(record, image_fields))
        return Preview([*_texts_beside(record, texts), *texts], images, answered)
    except RecursionError:  # lists in lists, hundreds deep
        return Preview([], 0)


def _turns(turns: Any) -> list[tuple[Any, Any]]:
    """Tell for each turn who says it and what."""
    if isinstance(turns, Mapping):  # of lists, as older `datasets` make of a list of mappings
        contents, roles = first_given(turns, "value", "content"), first_given(turns, "from", "role")
        if not isinstance(contents, list):
            return []
        known = roles[: len(contents)] if isinstance(roles, list) else []
        return list(zip_longest(known, contents))
    if not isinstance(turns, list):
        return []
    return [
        (first_given(turn, "from", "role"), first_given(turn, "value", "content"))
        if isinstance(turn, Mapping)
        else (None, turn)
        for turn in turns
    ]


def _answered(roles: list[str | None], texts: list[str]) -> tuple[tuple[str, str], ...]:
    """Pair questions and answers as `Sample.questions` does, unsupervised answers too."""
    found, question, before = [], None, None
    for role, text in zip(roles, texts, strict=True):
        if role == "user":
            question = f"{question} {text}" if before == "user" else text
        elif role == "assistant" and question is not None and before != "assistant":
            found.append((question, text))
        before = role
    return tuple(found)


def _texts_beside(record: Mapping[str, Any], texts: list[str]) -> Iterator[str]:
    """Yield the text of tools, and a system text that is not among the turns."""
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
    """Read the text of a turn's content, or of a part of it; an image is its placeholder."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_text(part) for part in content)
    if not isinstance(content, Mapping):
        return ""
    if content.get("type") == "image":
        return IMAGE_PLACEHOLDER
    return _text(first_given(content, "value", "content", "text"))


_AT_A_TIME = 1024  # texts per call of the tokenizer
_MEASURED = 16  # samples that are encoded as a whole
_TRIED = 256  # to find these among bad ones


class Survey(NamedTuple):
    """What is known of every sample of a data set, in its order; both are 0 where its record cannot be read.

    Attributes:
        lengths: [S] int64, about how many tokens it has.
        images: [S] int64, how many.
    """

    lengths: NDArray[np.int64]
    images: NDArray[np.int64]


def survey(samples: Samples, encoder: SampleEncoder) -> Survey:
    """Look at every sample's record, whatever the encoder's limits are.

    The text's tokens are counted. What turns and images add is fitted to a few samples at random, the only
    ones whose images are read; so lengths are next to exact where every image has the same number of
    tokens, and miss the differences where that depends on its size.

    Raises:
        BadSample: none of many samples can be used.
        CachekdError: the data set cannot be read.
    """
    added = _fitted(samples, encoder.without_limits())
    lengths, images = np.zeros((2, len(samples)), np.int64)
    for start in range(0, len(samples), _AT_A_TIME):
        indices = range(start, min(start + _AT_A_TIME, len(samples)))
        found = {index: preview for index in indices if (preview := _preview(samples, index)) is not None}
        there, previews = list(found), list(found.values())
        tokens = _text_tokens(previews, encoder) + np.rint(_features(previews) @ added).astype(np.int64)
        lengths[there] = np.maximum(1, tokens)
        images[there] = [preview.images for preview in previews]
    return Survey(lengths, images)


def rough_lengths(samples: Samples, encoder: SampleEncoder) -> list[int]:
    """Survey the lengths alone, [S]."""
    return survey(samples, encoder).lengths.tolist()


def _preview(samples: Samples, index: int) -> Preview | None:
    try:
        return samples.preview(index)
    except BadSample:  # which shows when it is read
        return None


def _fitted(samples: Samples, encoder: SampleEncoder) -> NDArray[np.floating[Any]]:
    """Tokens that come on top of the text's: in every sample, per turn, per image."""
    # At random, not evenly spread: data sets have periods.
    some = np.random.default_rng(0).choice(len(samples), min(_TRIED, len(samples)), replace=False).tolist()
    previews: list[Preview] = []
    lengths: list[int] = []
    for index in some:
        try:
            preview, length = samples.preview(index), len(encoder(samples[index]))
        except BadSample:
            if not lengths and index == some[-1]:
                raise
            continue
        previews.append(preview)
        lengths.append(length)
        if len(lengths) == _MEASURED:
            break
    rest = np.array(lengths) - _text_tokens(previews, encoder)
    return np.linalg.lstsq(_features(previews), rest, rcond=None)[0]


def _features(previews: list[Preview]) -> NDArray[np.float64]:
    """Arrange one, turns and images as [N, 3]."""
    return np.array([(1.0, len(preview.texts), preview.images) for preview in previews]).reshape(-1, 3)


def _text_tokens(previews: list[Preview], encoder: SampleEncoder) -> NDArray[np.int64]:
    """Count the tokens of each one's texts, [N]."""
    texts = ["\n".join(preview.texts) for preview in previews]
    # Not by transformers' own call, which makes lists of everything: half the time.
    encoded = encoder.processor.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.array([len(some) for some in encoded], np.int64)
