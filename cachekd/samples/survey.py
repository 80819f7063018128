"""A whole data set, looked at without opening more than a few images: how long its samples are, about.

For batches of samples of similar length, and for `cachekd check`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachekd.errors import BadSample
from cachekd.samples.encode import SampleEncoder
from cachekd.samples.outline import Outline
from cachekd.samples.protocol import Samples

_AT_A_TIME = 1024  # texts per call of the tokenizer
_MEASURED = 16  # samples that are encoded as a whole
_TRIED = 256  # to find these among bad ones


class Survey(NamedTuple):
    """Of every sample of a data set, in its order; both are 0 where its record cannot be read.

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
        found = {index: outline for index in indices if (outline := _outline(samples, index)) is not None}
        there, outlines = list(found), list(found.values())
        tokens = _text_tokens(outlines, encoder) + np.rint(_features(outlines) @ added).astype(np.int64)
        lengths[there] = np.maximum(1, tokens)
        images[there] = [outline.images for outline in outlines]
    return Survey(lengths, images)


def rough_lengths(samples: Samples, encoder: SampleEncoder) -> list[int]:
    """[S], the lengths of `survey`."""
    return survey(samples, encoder).lengths.tolist()


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
