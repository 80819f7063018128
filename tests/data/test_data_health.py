"""Samples that are bad in themselves do not stop what leaves bad ones out; data that have gone do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cachekd.config import DataOptions, DumpConfig, TrainConfig
from cachekd.data.left_out import IN_A_ROW, IN_VAIN, DataHealth, attempts, first_good
from cachekd.dump import dump
from cachekd.errors import BadSample, CachekdError, LeftOut
from cachekd.train import train
from caches import SMALL
from tiny import checked, evaluated, with_long_ones, write_llava_json

LONG = 20  # neighbours; 16 in a row are looked into


def plain(student: Path, data: Path, out: Path, **changes: Any) -> TrainConfig:
    values = {"student": str(student), "data": data, "out": out, "lambda_align": 0, "lambda_vsd": 0}
    return TrainConfig(**values | {"batch_size": 2, "on_error": "skip"} | changes)


@pytest.mark.parametrize("first", [0, 3])
def test_neighbours_that_are_too_long_stop_neither_dump_nor_run_nor_evaluation(
    teacher_path, student_path, tmp_path, first
):
    data = with_long_ones(tmp_path / "data", 28, tuple(range(first, first + LONG)))
    config = {"teacher": str(teacher_path), "data": str(data), "out": tmp_path / "c", "on_error": "skip"}
    summary = dump(DumpConfig(**SMALL | config))
    assert (summary.finished, summary.samples, summary.skipped) == (True, 8, LONG)
    # The longest samples come first, all of them, wherever they stand.
    grouped = {"train_sampling_strategy": "group_by_length"}
    run = train(plain(student_path, data, tmp_path / "run", training=grouped))
    assert (run.steps, run.bad.samples) == (14, LONG)
    found = evaluated([student_path], data, on_error="skip")
    assert found.asked.left_out.samples == LONG
    assert found.asked.questions > 0
    assert checked(str(teacher_path), str(student_path), DataOptions(data=data, on_error="skip")).fits


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_whose_longest_samples_are_too_long(student_path, tmp_path, workers):
    """Those that workers read are looked into by the main process."""
    data = with_long_ones(tmp_path / "data", 40, tuple(range(1, 40, 2)))
    grouped = {"train_sampling_strategy": "group_by_length"}
    run = train(plain(student_path, data, tmp_path / "run", training=grouped, workers=workers))
    assert run.bad.samples == 20


def test_an_evaluation_stops_where_its_data_go(student_path, tmp_path):
    data = write_llava_json(tmp_path / "data", 160)

    def take_away(model: str, total: int, samples: int, questions: int) -> None:
        for image in data.parent.glob("*.png") if questions else ():
            image.unlink()

    with pytest.raises(CachekdError, match="16 samples in a row are bad, and one that was good is bad now"):
        evaluated([student_path], data, take_away, on_error="skip", batch_size=2)


def bad(index: int) -> BadSample:
    return BadSample("broken", found=f"number {index}")


def test_attempts_go_on_all_over_the_data_and_end():
    tried = [index for index, _ in attempts(5000, bad)]
    assert tried[:IN_A_ROW] == [*range(IN_A_ROW)]
    assert len(set(tried)) == len(tried) == IN_VAIN
    others = sorted(tried[IN_A_ROW:])
    assert max(b - a for a, b in zip([0, *others], [*others, 5000], strict=True)) < 5000 / 60
    with pytest.raises(CachekdError, match=r"no sample can be used[\s\S]*256 of 5,000 .* broken: number 0"):
        first_good(5000, bad)
    assert [index for index, _ in attempts(30, bad)] != [*range(30)]
    assert sorted(index for index, _ in attempts(30, bad)) == [*range(30)]
    assert first_good(5000, lambda index: index if index >= 1000 else bad(index))[0] >= 1000


def test_what_the_settings_leave_out_is_no_attempt_in_vain():
    def attempt(index: int) -> int:
        if index < 900:
            raise LeftOut("too long")
        return index

    assert first_good(1000, attempt) == (900, 900)
    health = DataHealth(1000, attempt)
    health.bad(LeftOut("too long") for _ in range(40))


def test_a_bad_sample_ends_the_attempts_where_it_ends_all():
    def attempt(index: int) -> int:
        raise bad(index)

    with pytest.raises(BadSample, match="number 0"):
        first_good(9, attempt)


def test_the_data_are_looked_at_every_sixteen_samples():
    """Neighbours that are bad in themselves, and behind them data that have gone."""
    there, looks = [True], []

    def read(index: int) -> int:
        looks.append(index)
        if not there[0]:
            raise bad(index)
        return index

    health = DataHealth(1000, read)
    health.good(7)
    for count in range(1, 40):
        health.bad([bad(count)])
    assert looks == [7, 7]
    there[0] = False
    with pytest.raises(CachekdError, match="48 samples in a row are bad, and one that was good is bad now"):
        health.bad(bad(count) for count in range(9))
    health.good()  # of others, not to be read again
    health.bad(bad(count) for count in range(15))
    with pytest.raises(CachekdError, match=r"^one that was good is bad now"):
        health.require_there()
