"""Samples for every family of tiny_families.py."""

from __future__ import annotations

from functools import cache

import pytest

from cachekd.data import Sample, SampleEncoder
from cachekd.data.conversation import messages_from_turns
from tiny import noise_image
from tiny_families import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def encoder_of(family: str) -> SampleEncoder:
    return SampleEncoder(FAMILIES[family].processor())


def sample(key: str, *turns: str, sizes: tuple[tuple[int, int], ...] = (), seed: int = 0) -> Sample:
    """A conversation; an image of noise for each size."""
    roles = ("human", "gpt")
    said = [{"from": roles[index % 2], "value": text} for index, text in enumerate(turns)]
    images = tuple(noise_image(seed + index, size) for index, size in enumerate(sizes))
    return Sample(key, images, tuple(messages_from_turns(said, len(images), key)), "test")


WIDE = sample("wide", "<image>what is it?", "a large green dog.", sizes=((40, 30),))
TALL = sample("tall", "<image>is there a blue circle?", "no", sizes=((28, 56),), seed=5)
TEXT = sample("text", "is there a dog?", "yes no")
TWO = sample("two", "<image>and <image>?", "red", sizes=((28, 56), (50, 50)), seed=7)
