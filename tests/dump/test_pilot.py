"""What the pilot says beforehand, and what the dump then costs."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from cachekd.cache import LogitCache
from cachekd.config import DumpConfig
from cachekd.data.spread import evenly, spread
from cachekd.dump import dump, estimate_dump
from cachekd.dump.estimate import ALL_THAT_BYTES_BUY
from cachekd.dump.plan import refuse_small_disk
from cachekd.errors import CachekdError
from caches import ROOT
from launch import output_of
from tiny import tar_members, write_tar

EXAMPLE = ROOT / "examples" / "easy_vqa"
SAMPLES = 240


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pilot-data")
    write_tar(folder / "0.tar", tar_members(SAMPLES))
    return folder


def settings(teacher: Path, data: Path, out: Path, **changes) -> DumpConfig:
    values = {"teacher": str(teacher), "data": str(data), "out": out, "batch_size": 4}
    return DumpConfig(**values | {"calibration_tokens": 300} | changes)


@pytest.mark.parametrize("tail", ["none", "bytes=12", "exact"])
def test_an_estimate_is_within_ten_percent_and_writes_nothing(tmp_path, teacher_path, many, tail):
    config = settings(teacher_path, many, tmp_path / "c", tail=tail)
    found = estimate_dump(config)
    assert not (tmp_path / "c").exists()
    summary = dump(config)
    assert found.samples == SAMPLES
    assert found.tokens == pytest.approx(summary.tokens, rel=0.1)
    assert abs(found.tokens - summary.tokens) < 4 * found.tokens_error
    assert found.shard_bytes == pytest.approx(summary.bytes, rel=0.1)
    assert (found.sketch_bytes, found.vocabulary_bytes) == (summary.sketch_bytes, summary.vocabulary_bytes)
    assert found.seconds > 0
    assert found.peak_memory > 2**27  # torch alone takes more


@pytest.fixture(scope="module")
def default_size(tmp_path_factory, teacher_path, many) -> int:
    """Of the whole cache, without a budget."""
    out = tmp_path_factory.mktemp("pilot-default") / "c"
    return estimate_dump(settings(teacher_path, many, out, tail="bytes=16")).size


@pytest.mark.parametrize("share", [0.45, pytest.param(0.7, marks=pytest.mark.slow), 1.0, 3.0])
def test_a_disk_budget_is_kept_and_used(tmp_path, teacher_path, many, default_size, share):
    """A share of what the default setting takes; far more than any sketch needs, it takes what that needs."""
    config = settings(teacher_path, many, tmp_path / "c", tail="bytes=16")
    budget = int(share * default_size)
    summary = dump(config.model_copy(update={"disk_budget": budget}))
    codec = LogitCache(tmp_path / "c").manifest.codec
    size = summary.bytes + summary.sketch_bytes + summary.vocabulary_bytes
    assert size <= budget * 1.03
    if codec.tail not in ("exact", ALL_THAT_BYTES_BUY):  # without a sketch only k is left to choose, in steps
        assert size >= (0.9 if codec.tail != "none" else 0.7) * budget, codec
    # The same command again finds the choice that was made.
    assert dump(config.model_copy(update={"disk_budget": budget})).new_tokens == 0


def test_a_budget_for_nothing_is_refused(tmp_path, teacher_path, many):
    with pytest.raises(CachekdError, match="disk budget is too small") as caught:
        dump(settings(teacher_path, many, tmp_path / "c", disk_budget=5_000))
    assert "at least" in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path, teacher_path, many, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(CachekdError, match="the disk is too small") as caught:
        dump(settings(teacher_path, many, tmp_path / "c"))
    assert "0.010 MB are free" in str(caught.value)
    assert "--disk-budget 9kB" in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_a_disk_that_got_too_small_for_a_dump_that_has_begun(tmp_path):
    """Its settings stay, so that a budget would be refused."""
    with pytest.raises(CachekdError, match="the same command again") as caught:
        refuse_small_disk(tmp_path, 10**18, "the other 9 shards")
    assert "--disk-budget" not in str(caught.value)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_groups_are_spread_and_each_comes_once(count):
    order = list(spread(count))
    assert sorted(order) == list(range(count))
    for taken in range(2, min(count, 20)):  # no half of the data set is left out
        some = order[:taken]
        assert min(some) < count / 2 <= max(some) + 1


def test_batches_of_a_group_are_takenevenly():
    batches = list(range(8))
    for turn in range(5):
        for wanted in range(1, 9):
            chosen = evenly(batches, wanted, turn)
            assert len(set(chosen)) == len(chosen) == wanted
            assert max(b - a for a, b in itertools.pairwise(chosen)) <= -(-8 // wanted) if wanted > 1 else 1


@pytest.mark.slow
def test_an_estimate_of_real_data_is_within_ten_percent(tmp_path):
    """The demo's teacher on easy-VQA, from a sixth of its tokens."""
    sizes = ("--images", 500, "--test-images", 10)
    output_of(EXAMPLE / "prepare.py", "--out", tmp_path, *sizes)
    teacher = EXAMPLE / "teacher"
    for changes in ({}, {"disk_budget": 125_000}):
        config = settings(teacher, tmp_path / "train", tmp_path / f"c{len(changes)}", calibration_tokens=500)
        config = config.model_copy(update={"batch_size": 16, **changes})
        found, summary = estimate_dump(config), dump(config)
        assert found.tokens == pytest.approx(summary.tokens, rel=0.1)
        assert found.shard_bytes == pytest.approx(summary.bytes, rel=0.1)
        if changes:
            size = summary.bytes + summary.sketch_bytes + summary.vocabulary_bytes
            assert size <= 125_000 * 1.03
