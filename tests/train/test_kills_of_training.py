"""A run that is killed, at any moment, in any of its processes, ends bit-equal to one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from cachekd.config import TrainConfig
from cachekd.paths import RUN_FILE
from cachekd.train import train
from cachekd.train.folder import CHECKPOINTS, PART
from launch import FORKS, KILLS, Command, launched, train_in_two_processes
from workers import wait_until_gone

pytestmark = pytest.mark.slow
STEPS = 60


@pytest.fixture(scope="module")
def settings(student_path, data_path) -> dict[str, Any]:
    """L_CE alone: what is saved is the same, and steps are quick."""
    return {
        "student": str(student_path),
        "data": str(data_path),
        "lambda_align": 0.0,
        "lambda_vsd": 0.0,
        "batch_size": 4,
        "epochs": 20,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings) -> tuple[list[float], bytes]:
    """What an undisturbed run has; whoever reads its samples."""
    out = tmp_path_factory.mktemp("kills") / "whole"
    train(TrainConfig(**settings, out=out))
    return result_of(out)


def result_of(out: Path) -> tuple[list[float], bytes]:
    """All losses, and the student."""
    log = json.loads((out / RUN_FILE).read_text())["log"]
    losses = [entry["loss"] for entry in log if "ce" in entry]
    assert len(losses) == STEPS
    assert not (out / PART).exists()
    return losses, (out / "model.safetensors").read_bytes()


def run_train(settings: dict[str, Any]) -> None:
    import torch
    from transformers.utils import logging

    os.setsid()  # it and its workers are a group
    multiprocessing.set_start_method("fork", force=True)  # of them, as anywhere else
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    train(TrainConfig(**settings))


def begin(settings: dict[str, Any]) -> ForkServerProcess:
    process = FORKS.Process(target=run_train, args=(settings,))
    process.start()
    return process


def finish(settings: dict[str, Any]) -> tuple[list[float], bytes]:
    process = begin(settings)
    process.join(300)
    assert process.exitcode == 0
    return result_of(settings["out"])


def descendants(process: int) -> list[int]:
    """Its children and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process:
            child = int(stat.parent.name)
            found += [child, *descendants(child)]
    return found


def kill(process: ForkServerProcess, *, group: bool) -> None:
    """With its workers, or alone: then they have to see that it is gone."""
    workers = descendants(process.pid or 0)
    if group:
        try:
            os.killpg(process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:  # it has no group yet
            process.kill()
    else:
        process.kill()
    process.join()
    wait_until_gone(workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments(tmp_path, settings, whole, workers):
    generator, kills, number = random.Random(workers), 0, 0
    started = time.perf_counter()
    assert finish({**settings, "workers": workers, "out": tmp_path / "timed"}) == whole
    duration = time.perf_counter() - started
    while kills < max(1, KILLS // 2):
        number += 1
        run = {**settings, "workers": workers, "out": tmp_path / str(number)}
        for _ in range(4):  # the same run, killed again and again
            process = begin(run)
            process.join(generator.uniform(0.2, 0.9) * duration)
            if not process.is_alive():
                duration *= 0.8  # it was measured while the machine was busier
                break
            kill(process, group=generator.random() < 0.5)
            kills += 1
        if not (run["out"] / RUN_FILE).exists():
            assert finish(run) == whole
        assert result_of(run["out"]) == whole


def half_a_checkpoint(out: Path) -> bool:
    return any(
        not (path / "trainer_state.json").exists() for path in (out / CHECKPOINTS).glob("checkpoint-[5-9]*")
    )


def half_a_student(out: Path) -> bool:
    return (out / PART).exists()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("moment", [half_a_checkpoint, half_a_student])
def test_killed_while_it_saves(tmp_path, settings, whole, workers, moment: Callable[[Path], bool]):
    hit = number = 0
    while hit < max(1, KILLS // 12) and number < KILLS:  # now and then it is over before it is seen
        number += 1
        run = {**settings, "workers": workers, "out": tmp_path / str(number)}
        process = begin(run)
        while process.is_alive() and not moment(run["out"]):
            time.sleep(0.0005)
        kill(process, group=True)
        hit += moment(run["out"])
        if not (run["out"] / RUN_FILE).exists():
            assert finish(run) == whole
        assert result_of(run["out"]) == whole
    print(f"{moment.__name__}: {hit} of {number} hit")
    assert hit


# ---- SIGTERM to all


def test_sigterm_to_the_whole_group(tmp_path, settings, whole):
    """As batch systems send it: to the command and its 4 workers."""
    run = {**settings, "workers": 4, "out": tmp_path / "run"}
    options = {name: value for name, value in run.items() if name != "training"}
    words = [word for n, v in options.items() for word in (f"--{n.replace('_', '-')}", str(v))]
    before = 0
    for seconds in (0.2, 0.5, 0.35):
        process = Command("train", *words, new_session=True)
        wait_for_checkpoint(run["out"], before + 1, process)
        time.sleep(seconds * random.Random(seconds).random())
        os.killpg(process.pid, signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
        assert process.returncode == 143, told
        assert "Traceback" not in told
        (step,) = re.findall(r"stopped at step (\d+) of 60: the same command goes on from step \1\n", told)
        assert before < int(step) < STEPS
        before = int(step)
        assert (run["out"] / CHECKPOINTS / f"checkpoint-{before}" / "trainer_state.json").exists()
    assert finish(run) == whole


def wait_for_checkpoint(out: Path, least: int, process: Command) -> None:
    """Until there is a whole one of at least so many steps."""
    while not any(
        int(path.parent.name.rpartition("-")[2]) >= least
        for path in (out / CHECKPOINTS).glob("checkpoint-*/trainer_state.json")
    ):
        assert process.poll() is None
        time.sleep(0.01)


# ---- two processes


@pytest.fixture(scope="module")
def recipe(settings) -> Callable[[Path], Path]:
    def write(out: Path) -> Path:
        file = out.with_suffix(".yaml")
        file.write_text(json.dumps({**settings, "batch_size": 2, "workers": 1, "out": str(out)}))
        return file

    return write


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory, recipe) -> tuple[list[float], bytes]:
    out = tmp_path_factory.mktemp("kills") / "two"
    done = train_in_two_processes(recipe(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return result_of(out)


@pytest.mark.parametrize("who", ["all", "rank 0", "rank 1"])
def test_a_run_of_two_processes_is_killed(tmp_path, recipe, whole_of_two, who):
    """One alone takes the launcher and the other with it; nothing hangs."""
    out = tmp_path / "run"
    process = launched(recipe(out))
    wait_for_checkpoint(out, 1, process)
    time.sleep(random.Random(who).uniform(0, 0.5))
    everyone = [process.pid, *descendants(process.pid)]
    for victim in everyone if who == "all" else [rank_process(everyone, who[-1])]:
        os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    wait_until_gone(everyone, 30)
    assert not (out / RUN_FILE).exists()
    done = train_in_two_processes(recipe(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert result_of(out) == whole_of_two
    assert json.loads((out / RUN_FILE).read_text())["resumed_from"] > 0


def rank_process(processes: list[int], rank: str) -> int:
    """Workers have its environment too; their parent is the one."""
    found = [p for p in processes if f"RANK={rank}" in Path(f"/proc/{p}/environ").read_text().split("\0")]
    return found[0]


def test_sigterm_to_the_whole_group_of_two_processes(tmp_path, recipe, whole_of_two):
    """The launcher, both processes and their workers."""
    out = tmp_path / "run"
    process = launched(recipe(out))
    wait_for_checkpoint(out, 1, process)
    for each in [process.pid, *descendants(process.pid)]:
        os.kill(each, signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    found = re.findall(r"stopped at step (\d+) of 60: the same command goes on from step \1\n", told)
    assert len(found) == 1, told
    (step,) = found
    done = train_in_two_processes(recipe(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / RUN_FILE).read_text())["resumed_from"] == int(step)
    assert result_of(out) == whole_of_two
