"""Several processes, one cache: disjoint shards, no talking; the dead are replaced by whoever comes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from cachekd.cache import LogitCache, verify_files
from launch import LAUNCHER, Command, output_of
from tiny import tar_members, write_tar


def command(teacher: Path, data: Path, out: Path) -> list[str]:
    return [
        "dump",
        *("--teacher", str(teacher), "--data", str(data), "--out", str(out)),
        *("--batch-size", "2", "--shard-samples", "12", "--calibration-tokens", "60", "--json"),
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workers-data")
    write_tar(folder / "0.tar", tar_members(90))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teacher_path, data) -> dict[str, bytes]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("workers-alone") / "c"
    process = Command(*command(teacher_path, data, out))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return files_of(out)


def test_two_ranks_write_what_one_process_writes(tmp_path, teacher_path, data, alone):
    """One by --rank, one by the environment of torchrun; at the same time."""
    out = tmp_path / "c"
    ranks = [
        Command(*command(teacher_path, data, out), "--rank", "0", "--world-size", "2"),
        Command(*command(teacher_path, data, out), environment={"RANK": "1", "WORLD_SIZE": "2"}),
    ]
    results = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], results
    assert any('"finished": true' in stdout for stdout, _ in results)
    assert files_of(out) == alone


def test_a_dead_ranks_shards_are_picked_up(tmp_path, teacher_path, data, alone):
    """Three ranks, one killed once it has written something; the others end, and any resume does the rest."""
    out = tmp_path / "c"
    common = command(teacher_path, data, out)
    ranks = [Command(*common, "--rank", str(rank), "--world-size", "3") for rank in range(3)]
    while not (out / "dump" / "00001.json").exists() and ranks[1].poll() is None:
        time.sleep(0.01)
    ranks[1].kill()
    results = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [0, -signal.SIGKILL, 0], results
    if not (out / "manifest.json").exists():  # it was killed in time
        assert all('"finished": false' in results[rank][0] for rank in (0, 2))
    process = Command(*common, "--rank", "0", "--world-size", "1")
    assert process.wait() == 0
    assert files_of(out) == alone
    assert verify_files(out) == []
    assert len(LogitCache(out)) == 90


@pytest.mark.slow
def test_accelerate_launches_it(tmp_path, teacher_path, data, alone):
    out = tmp_path / "c"
    launch = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "-m", "cachekd_cli", *command(teacher_path, data, out)]
    output_of(LAUNCHER, *launch)
    assert files_of(out) == alone


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_in_order_and_it_says_how_to_go_on(
    tmp_path, teacher_path, data, alone, number, code
):
    out = tmp_path / "c"
    process = Command(*command(teacher_path, data, out))
    while not (out / "dump" / "00000.json").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code, errors
    assert "of 8 shards are finished and stay" in errors
    assert "Run the same command again" in errors
    assert "Traceback" not in errors
    assert not list(out.rglob(".*.tmp-*"))
    again = Command(*command(teacher_path, data, out))
    assert again.wait() == 0
    assert files_of(out) == alone


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_ends_it_at_once(tmp_path, teacher_path, data, number, code):
    """A terminal's Ctrl-C and a batch system's SIGTERM reach the reading processes too."""
    arguments = [*command(teacher_path, data, tmp_path / "c"), "--workers", "2"]
    process = Command(*arguments, new_session=True)
    while not (tmp_path / "c" / "dump" / "00000.json").exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
