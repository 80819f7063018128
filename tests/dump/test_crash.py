"""A dump that is killed, at any moment, goes on to the very bytes of one that was not."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cachekd.cache import LogitCache, verify_files
from cachekd.config import DumpConfig
from cachekd.errors import CachekdError
from launch import FORKS, KILLS
from tiny import tar_members, write_tar


def files_of(folder: Path) -> dict[str, bytes]:
    """All of a cache, temporary files included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_dump(settings: dict[str, Any], die_at: int | None = None) -> None:
    """In a process of its own; kills itself with SIGKILL before file operation number `die_at`."""
    import torch
    from transformers.utils import logging

    from cachekd.dump import dump

    multiprocessing.set_start_method("fork", force=True)  # of its workers, as anywhere else
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if die_at is not None:
        left = [die_at]

        def dying(function: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapped

        for name in ("fsync", "link", "unlink", "rename", "replace"):
            setattr(os, name, dying(getattr(os, name)))
    dump(DumpConfig(**settings))


def in_a_process(settings: dict[str, Any], die_at: int | None = None) -> multiprocessing.Process:
    process = FORKS.Process(target=run_dump, args=(settings, die_at))
    process.start()
    return process


def finish(settings: dict[str, Any]) -> None:
    process = in_a_process(settings)
    process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def settings(tmp_path_factory, teacher_path) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("crash-data")
    write_tar(data / "0.tar", tar_members(90))
    return {
        "teacher": str(teacher_path),
        "data": str(data),
        "batch_size": 2,
        "shard_samples": 12,
        "calibration_tokens": 60,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings) -> dict[str, bytes]:
    """What an uninterrupted dump writes."""
    out = tmp_path_factory.mktemp("crash-whole") / "c"
    finish({**settings, "out": out})
    files = files_of(out)
    assert sum(name.startswith("shards/") for name in files) == 8
    assert {"sketch.zarr.zip", "vocabulary.zarr.zip"} <= set(files)
    return files


def assert_sound(out: Path) -> None:
    """At any moment: no cache, or a whole one."""
    if (out / "manifest.json").exists():
        assert len(LogitCache(out)) == 90
        assert verify_files(out) == []
    else:
        with pytest.raises(CachekdError, match=r"did not finish|not a cache"):
            LogitCache(out)


def test_killed_at_a_few_file_operations(tmp_path, settings, whole):
    out = {**settings, "out": tmp_path / "c"}
    for die_at in (2, 9, 24):
        process = in_a_process(out, die_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_sound(tmp_path / "c")
    finish(out)
    assert files_of(tmp_path / "c") == whole


@pytest.mark.slow
def test_killed_at_every_kind_of_file_operation(tmp_path, settings, whole):
    """Every run dies one operation later than the last, wherever that is by then."""
    out = {**settings, "out": tmp_path / "c"}
    for die_at in range(1, 200):
        process = in_a_process(out, die_at)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert_sound(tmp_path / "c")
    assert die_at > 12
    assert files_of(tmp_path / "c") == whole


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (0, 2)])
def test_killed_at_random_moments(tmp_path, settings, whole, workers, ranks):
    """Of two ranks both, or one alone, after which the other ends by itself."""
    generator, kills = random.Random(0), 0
    started = time.perf_counter()
    finish({**settings, "workers": workers, "out": tmp_path / "timed"})
    duration = time.perf_counter() - started
    folder = 0
    while kills < max(1, KILLS // 3):
        folder += 1
        out = {**settings, "workers": workers, "out": tmp_path / str(folder)}
        for _ in range(8):  # the same dump, killed again and again
            shares = [{"rank": rank, "world_size": ranks} for rank in range(ranks)]
            processes = [in_a_process(out | share) for share in shares]
            processes[0].join(generator.uniform(0.3, 1.0) * duration)
            if not all(process.is_alive() for process in processes):
                duration *= 0.8  # it was measured while the machine was busier
                break
            for process in generator.sample(processes, generator.randint(1, ranks)):
                process.kill()
                kills += 1
            for process in processes:
                process.join(60)
                assert process.exitcode in (0, -signal.SIGKILL)
            assert_sound(tmp_path / str(folder))
        for process in processes:
            process.join()
        finish(out)
        assert files_of(tmp_path / str(folder)) == whole


def test_a_finished_shard_is_never_made_again(tmp_path, settings, whole):
    out = {**settings, "out": tmp_path / "c"}
    process = in_a_process(out, 40)
    process.join()
    shards = tmp_path / "c" / "shards"
    records = sorted(path.stem for path in (tmp_path / "c" / "dump").glob("0*.json"))
    assert records
    before = {name: (shards / f"{name}.zarr.zip").stat().st_mtime_ns for name in records}
    finish(out)
    assert {name: (shards / f"{name}.zarr.zip").stat().st_mtime_ns for name in records} == before
    assert files_of(tmp_path / "c") == whole
