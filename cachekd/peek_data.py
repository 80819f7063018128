"""The samples themselves beside what a cache says of them, checked against its content hashes."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from cachekd.cache import LogitCache
from cachekd.check.match import check_content
from cachekd.data import Sample, SampleEncoder, Samples
from cachekd.data.sample import is_supervised
from cachekd.errors import CachekdError

LARGEST = 640  # pixels, of an image on a page
_SMALL = 128  # below that PNG is small, and exact


class PeekedData:
    """Samples by key.

    Args:
        cache: whose samples they are.
        samples: the data set.
        processor: that the cache was made with. It tells several answers apart; None: they are unknown.
    """

    def __init__(self, cache: LogitCache, samples: Samples, processor: Any = None) -> None:
        self.cache, self.samples = cache, samples
        self._places = {key: index for index, key in enumerate(samples.keys)}
        self._processor = processor

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Sample:
        """Read one sample.

        Raises:
            CachekdError: the data set lacks it, or it is not the one that the teacher saw.
            BadSample: it cannot be read.
        """
        if key not in self._places:
            raise CachekdError(
                f"the data set has no sample {key!r}",
                where=str(self.cache.path),
                expected=f"one of its {len(self.samples):,} keys, such as {self.samples.keys[0]!r}",
                fix="pass the data set that was dumped, read by the same --map and --key",
            )
        sample = self.samples[self._places[key]]
        check_content(self.cache, key, sample.content_hash)
        return sample

    def turns(self, sample: Sample) -> list[int] | None:
        """[N], which supervised answer each answer token is in, from 0; None where that is unknown.

        Raises:
            BadSample: the answers cannot be located.
        """
        if sum(map(is_supervised, sample.messages)) == 1:
            return [0] * len(self.cache[sample.key])
        if self._processor is None:
            return None
        found: list[int] = SampleEncoder(self._processor).turns(sample).tolist()
        return found[: len(self.cache[sample.key])]  # the dump may have cut it


def embedded(image: Image.Image) -> str:
    """An image as a page holds it: a data URI, at most LARGEST pixels a side."""
    small = image.copy()
    small.thumbnail((LARGEST, LARGEST))
    kind = "PNG" if max(small.size) <= _SMALL else "JPEG"
    stream = io.BytesIO()
    small.save(stream, format=kind, quality=85)
    content = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{content}"
