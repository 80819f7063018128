"""A whole data set, looked at without opening more than a few images: how long its samples are, about.

For batches of samples of similar length, and for `cachekd check`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.data.encode import SampleEncoder
from cachekd.data.sample import Preview, Samples
from cachekd.errors import BadSample

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
