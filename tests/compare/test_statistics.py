"""Means and paired intervals over seeds, against textbooks and slow references."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.compare.statistics import mean_of, paired_difference
from caches import ROOT

# Student's own example (The probable error of a mean, Biometrika 6, 1908): hours of sleep that ten patients
# gained with each of two drugs; R has it as `sleep`.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def quantile_of_t(p: float, degrees: int) -> float:
    """By adding up its density in small steps, and halving."""

    def density(x):
        scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    def below(x):
        heights = density(np.linspace(0, x, 20001))
        return 0.5 + float((heights[1:] + heights[:-1]).sum()) / 2 * x / 20000

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < p else (low, middle)
    return low


def test_students_own_example():
    """R: `t.test(..., paired = TRUE)` says t = -4.0621, df = 9, -2.4598858 to -0.7001142."""
    found = paired_difference(FIRST, SECOND)
    mean, half = found.mean.mean, found.half_width
    assert mean == pytest.approx(-1.58)
    assert mean / found.mean.standard_error == pytest.approx(-4.0621, abs=5e-5)
    assert (mean - half, mean + half) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_an_interval_is_the_textbooks(seeds):
    random = np.random.default_rng(seeds)
    ours, theirs = random.normal(size=(2, seeds)).tolist()
    gained = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(gained) / seeds
    variance = sum((one - mean) ** 2 for one in gained) / (seeds - 1)
    found = paired_difference(ours, theirs)
    assert found.mean.mean == pytest.approx(mean)
    assert found.mean.standard_error == pytest.approx(math.sqrt(variance / seeds))
    assert found.half_width == pytest.approx(
        quantile_of_t(0.975, seeds - 1) * math.sqrt(variance / seeds), rel=1e-5
    )


def test_of_twenty_intervals_one_misses():
    """Five seeds, a true difference of 0.3: how often is it within?"""
    random = np.random.default_rng(0)
    within = 0
    for _ in range(4000):
        seed = random.normal(size=5)  # that both share, and that is much larger than what they do not
        ours, theirs = 0.3 + 10 * seed + random.normal(size=5), 10 * seed + random.normal(size=5)
        found = paired_difference(ours.tolist(), theirs.tolist())
        within += abs(found.mean.mean - 0.3) <= found.half_width
    assert within / 4000 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000))


def test_the_documentations_widths_are_those_of_the_intervals():
    text = (ROOT / "docs" / "how-to" / "comparing.md").read_text()
    seeds, widths = (
        re.search(rf"^\| {row} \| (.*) \|$", text, re.M)[1].split(" | ") for row in ("seeds", "half width")
    )
    for count, width in zip(map(int, seeds), map(float, widths), strict=True):
        values = np.random.default_rng(count).normal(size=count).tolist()
        found = paired_difference(values, [0.0] * count)
        assert found.half_width / np.std(values, ddof=1) == pytest.approx(width, abs=0.005)
    widest = {count: quantile_of_t(0.975, count - 1) / math.sqrt(count) for count in (6, 7)}
    assert widest[7] < 1 < widest[6]  # "seven seeds or more"


def test_what_both_have_of_a_seed_is_no_noise():
    theirs = [60.0, 70.0, 80.0]
    found = paired_difference([one + gain for one, gain in zip(theirs, (1.0, 1.1, 1.2), strict=True)], theirs)
    assert found.mean.mean == pytest.approx(1.1)
    assert found.mean.standard_error == pytest.approx(0.1 / math.sqrt(3))


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(-50, 50), st.floats(0.1, 10))
def test_an_interval_moves_and_scales_with_its_values(values, shift, scale):
    base = paired_difference(values, [0.0] * len(values))
    moved = paired_difference([scale * one + shift for one in values], [0.0] * len(values))
    assert moved.mean.mean == pytest.approx(scale * base.mean.mean + shift, abs=1e-6)
    if base.half_width is not None and base.half_width > 1e-6 and moved.half_width is not None:
        assert moved.half_width == pytest.approx(scale * base.half_width, rel=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"), [([0.8], [0.7]), ([0.8, 0.9, 0.7], [0.7, 0.8, 0.6]), ([0.5, 0.5], [0.5, 0.5])]
)
def test_one_seed_and_differences_that_are_all_equal_have_no_interval(ours, theirs):
    """0.8 - 0.7 and 0.9 - 0.8 differ in the last bit: that is no spread."""
    found = paired_difference(ours, theirs)
    assert found.half_width is None
    assert found.mean.mean == pytest.approx(ours[0] - theirs[0])


def test_a_mean_of_one_value_has_no_error():
    assert mean_of([3.0]).model_dump() == {"mean": 3.0, "standard_error": None, "values": 1}
    assert mean_of([1.0, 3.0]).standard_error == pytest.approx(1.0)
