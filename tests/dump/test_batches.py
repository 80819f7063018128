"""Batches of a dump by their padded tokens: as they are said, or as they fit the memory."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cachekd.cache import LogitCache
from cachekd.cache.plan import read_plan
from cachekd.config import DumpConfig
from cachekd.data.batches import BatchLimits
from cachekd.dump import dump, estimate_dump
from cachekd.models.memory import OutOfMemory
from caches import copied, files_of

LONGEST = 188
SEEN = 185  # the longest among those that are looked at first


def settings(teacher: Path, data: Path, out: Path, **changes) -> DumpConfig:
    values = {"teacher": str(teacher), "data": str(data), "out": out, "calibration_tokens": 300}
    return DumpConfig(**values | changes)


def geometry(out: Path):
    return read_plan(out / "dump" / "plan.json").source.geometry


def cells(batches: list[tuple[int, int]]) -> list[int]:
    return [samples * longest for samples, longest in batches]


def forget_shards(cache: Path, *numbers: int) -> None:
    """Make of a finished cache a dump that stopped before it made these shards."""
    (cache / "manifest.json").unlink()
    for number in numbers:
        for file in (f"dump/{number:05d}.json", f"shards/{number:05d}.zarr.zip"):
            (cache / file).unlink()


# ---- cutting


def test_batches_are_as_full_as_they_may_be():
    lengths = [9, 3, 3, 30, 4, 9, 2, 8]
    batches = BatchLimits(tokens=16).cut(lengths)
    assert [[lengths[i] for i in some] for some in batches] == [[2, 3, 3, 4], [8], [9], [9], [30]]
    assert sorted(place for some in batches for place in some) == list(range(8))
    both = BatchLimits(samples=2, tokens=16).cut(lengths)
    assert [[lengths[i] for i in some] for some in both] == [[2, 3], [3, 4], [8], [9], [9], [30]]
    by_number = BatchLimits(samples=3).cut(lengths)
    assert [[lengths[i] for i in some] for some in by_number] == [[2, 3, 3], [4, 8, 9], [9, 30]]
    assert BatchLimits(tokens=16).cut([]) == []


# ---- as they are said


def test_a_batch_has_no_more_padded_tokens_than_are_said(tmp_path, teacher_path, unequal_data, card):
    config = settings(teacher_path, unequal_data, tmp_path / "c", batch_tokens=600)
    assert dump(config).finished
    assert max(cells(card.batches)) <= 600
    assert geometry(tmp_path / "c").batch_tokens == 600
    # As full as lengths allow, but for the first forwards, of one sample.
    full = [size for size in cells(card.batches) if size > 600 - LONGEST]
    assert len(full) > len(card.batches) / 2


def test_with_both_limits_a_batch_keeps_both(tmp_path, teacher_path, unequal_data, card):
    dump(settings(teacher_path, unequal_data, tmp_path / "c", batch_tokens=600, batch_size=5))
    assert max(cells(card.batches)) <= 600
    assert max(samples for samples, _ in card.batches) == 5


def test_a_number_of_samples_alone_is_what_it_was(tmp_path, teacher_path, unequal_data, card):
    dump(settings(teacher_path, unequal_data, tmp_path / "c", batch_size=8))
    assert {samples for samples, _ in card.batches} == {1, 8}
    plan = json.loads((tmp_path / "c" / "dump" / "plan.json").read_text())
    assert plan["source"]["geometry"] == {
        "shard_samples": 128,
        "group_samples": 64,
        "batch_size": 8,
        "calibration_tokens": 300,
        "budget_for": None,
        "disk_budget": None,
    }
    assert "halved" not in (tmp_path / "c" / "manifest.json").read_text()


def test_what_is_kept_does_not_depend_on_batches(tmp_path, teacher_path, unequal_data):
    caches = []
    for name, changes in {"one": {"batch_size": 1}, "many": {"batch_tokens": 2000}}.items():
        dump(settings(teacher_path, unequal_data, tmp_path / name, tail="none", **changes))
        caches.append(LogitCache(tmp_path / name))
    one, many = caches
    assert list(one) == list(many)
    for key in one:
        difference = (one[key].everywhere() - many[key].everywhere()).abs().max()
        assert difference <= 2 * one.manifest.codec.logprob_step


def test_a_sample_beyond_the_budget_runs_alone_and_that_is_said(
    tmp_path, teacher_path, data_path, card, caplog
):
    config = settings(teacher_path, data_path, tmp_path / "c", batch_tokens=10)
    assert dump(config).samples == 12
    assert {samples for samples, _ in card.batches} == {1}
    assert caplog.text.count("than a batch is to have, 10, runs alone") == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_tokens": 8, "batch_size": 16}, "more than batch_tokens, 8"),
        ({"on_oom": "again"}, "on_oom"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, changes, text):
    with pytest.raises(ValueError, match=text):
        settings(tmp_path, tmp_path, tmp_path / "c", **changes)


# ---- as they fit


def test_without_a_setting_the_peak_is_that_of_16_samples_and_batches_are_fewer(
    tmp_path, teacher_path, unequal_data, card
):
    dump(settings(teacher_path, unequal_data, tmp_path / "old", batch_size=16, calibration_tokens=1))
    old, card.batches = card.batches, []
    dump(settings(teacher_path, unequal_data, tmp_path / "new", calibration_tokens=1))
    assert geometry(tmp_path / "new").batch_tokens == 16 * SEEN
    assert max(cells(card.batches)) <= 16 * SEEN <= max(cells(old))
    assert len(card.batches) - 2 == 5 < len(old) - 1 == 6  # without the first one, and the trial


def test_batches_are_halved_until_they_fit_before_there_is_a_plan(tmp_path, teacher_path, unequal_data, card):
    card.tokens = 800
    summary = dump(settings(teacher_path, unequal_data, tmp_path / "c"))
    assert summary.finished
    assert summary.halved == 0  # not in the middle
    assert geometry(tmp_path / "c").batch_tokens == 16 * SEEN // 4
    too_large = [place for place, size in enumerate(cells(card.batches)) if size > 800]
    assert too_large == [1, 2]  # after the sample that the head is measured on
    assert [card.batches[place] for place in too_large] == [(16, SEEN), (8, SEEN)]


def test_answers_that_need_more_than_the_longest_sample_are_found_too(
    tmp_path, teacher_path, unequal_data, card
):
    """The pilot's own batches have to fit as well."""
    card.samples = 12
    summary = dump(settings(teacher_path, unequal_data, tmp_path / "c", calibration_tokens=10**6))
    assert summary.finished
    assert summary.halved == 0
    assert geometry(tmp_path / "c").batch_tokens < 12 * LONGEST


def test_a_dump_that_goes_on_has_the_same_batches_and_bytes(tmp_path, teacher_path, unequal_data, card):
    """Whatever would fit now."""
    card.tokens = 1000
    config = settings(teacher_path, unequal_data, tmp_path / "c", shard_samples=40)
    dump(config)
    before = files_of(tmp_path / "c")
    forget_shards(tmp_path / "c", 1)
    card.tokens, card.batches = None, []
    assert dump(config).finished
    assert files_of(tmp_path / "c") == before
    assert max(cells(card.batches)) <= 16 * SEEN // 4


def test_other_batches_than_the_plans_are_said(tmp_path, teacher_path, unequal_data, caplog):
    config = settings(teacher_path, unequal_data, tmp_path / "c", batch_size=16, shard_samples=40)
    for changed in ({}, {"batch_size": 8}, {"batch_size": None, "batch_tokens": 500}):
        dump(config)
        forget_shards(tmp_path / "c", 1)
        caplog.clear()
        dump(config.model_copy(update=changed))
        said = [message for message in caplog.messages if "goes on with" in message]
        assert len(said) == bool(changed)
        assert all("not its plan's at most 16 samples per forward" in message for message in said)


def test_a_plan_of_before_goes_on_in_its_number_of_samples(tmp_path, teacher_path, unequal_data, card):
    dump(settings(teacher_path, unequal_data, tmp_path / "c", batch_size=16, shard_samples=40))
    before = files_of(tmp_path / "c")
    forget_shards(tmp_path / "c", 2)
    card.batches = []
    dump(settings(teacher_path, unequal_data, tmp_path / "c", shard_samples=40))
    assert files_of(tmp_path / "c") == before
    assert max(samples for samples, _ in card.batches) == 16


def test_a_single_sample_that_does_not_fit_is_said_and_nothing_is_written(
    tmp_path, teacher_path, unequal_data, card
):
    card.tokens = SEEN - 1
    with pytest.raises(OutOfMemory, match=f"with {SEEN} tokens") as caught:
        dump(settings(teacher_path, unequal_data, tmp_path / "c"))
    assert "--max-tokens" in str(caught.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("changes", [{"batch_tokens": 2000}, {"batch_size": 16}])
def test_a_size_that_is_said_is_not_changed_in_silence(tmp_path, teacher_path, unequal_data, card, changes):
    card.tokens = 800
    with pytest.raises(OutOfMemory, match="--batch-tokens") as caught:
        dump(settings(teacher_path, unequal_data, tmp_path / "c", **changes))
    samples, longest = card.batches[-1]
    assert f"--batch-tokens {samples * longest // 2}:" in str(caught.value)
    assert not (tmp_path / "c").exists()


# ---- in the middle


@pytest.mark.parametrize("changes", [{"batch_tokens": 1500}, {"batch_size": 8}])
def test_in_the_middle_batches_are_halved_where_that_is_wanted(
    tmp_path, teacher_path, unequal_data, card, caplog, changes
):
    """And for the rest of the shard alone; its record says so, others have none."""
    changes = {**changes, "shard_samples": 48, "tail": "none", "calibration_tokens": 1}
    config = settings(teacher_path, unequal_data, tmp_path / "c", **changes)
    dump(config)
    whole = copied(tmp_path / "c", tmp_path / "whole")
    forget_shards(tmp_path / "c", 1)
    card.tokens, card.batches = 900, []
    with pytest.raises(OutOfMemory):
        dump(config)
    assert not (tmp_path / "c" / "manifest.json").exists()
    with caplog.at_level(logging.WARNING):
        summary = dump(config.model_copy(update={"on_oom": "halve"}))
    assert summary.finished
    assert summary.halved == 1
    assert "memory ran out: from now on at most" in caplog.text
    infos = LogitCache(tmp_path / "c").manifest.shards
    record = json.loads((tmp_path / "c" / "dump" / "00001.json").read_text())
    assert record["shard"]["halved"] == infos[1].halved > 0
    assert "halved" not in (tmp_path / "c" / "dump" / "00000.json").read_text()
    assert files_of(tmp_path / "c")["shards/00000.zarr.zip"] == files_of(whole)["shards/00000.zarr.zip"]
    ours, theirs = LogitCache(tmp_path / "c"), LogitCache(whole)
    assert list(ours) == list(theirs)  # in the samples' order
    for key in ours:
        difference = (ours[key].everywhere() - theirs[key].everywhere()).abs().max()
        assert difference <= 2 * ours.manifest.codec.logprob_step


def test_each_shard_begins_as_it_is_planned(tmp_path, teacher_path, unequal_data, card):
    """What a shard holds depends on nothing that came before."""
    config = settings(
        teacher_path,
        unequal_data,
        tmp_path / "c",
        batch_size=8,
        shard_samples=32,
        on_oom="halve",
        tail="none",
    )
    dump(config)
    forget_shards(tmp_path / "c", 0, 1, 2)
    card.tokens, card.batches = 900, []
    assert dump(config).halved == 3
    assert [size for size, _ in card.batches].count(8) >= 3


# ---- beforehand


@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 700}, {"batch_size": 4}])
def test_the_estimate_counts_the_forwards(tmp_path, teacher_path, unequal_data, card, changes):
    config = settings(teacher_path, unequal_data, tmp_path / "c", calibration_tokens=10**6, **changes)
    found = estimate_dump(config)
    assert not (tmp_path / "c").exists()
    card.batches = []
    dump(config.model_copy(update={"calibration_tokens": 1}))
    assert found.forwards == pytest.approx(len(card.batches), abs=4)
    assert found.tokens_per_second == pytest.approx(found.tokens / found.seconds)
    assert ("4 samples" if "batch_size" in changes else "padded tokens") in found.limits
