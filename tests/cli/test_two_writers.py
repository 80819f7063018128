"""Two processes and one folder: one writes, the other is told who does, and the dead keep nobody out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from typer.testing import CliRunner

from cachekd import lock as locks
from cachekd.config import DumpConfig, TrainConfig
from cachekd.dump import dump
from cachekd.errors import CachekdError, FailedWrite, cannot_write
from cachekd.evaluate import read_scores, save_in_runs
from cachekd.lock import LEASE_FILE, LOCK_FILE, alone, entries, staged_folder
from cachekd.paths import EVALUATIONS_FOLDER, RUN_FILE
from cachekd.train import train
from cachekd.train.checkpoints import SETTINGS_FILE
from cachekd.train.folder import CHECKPOINTS, PART, STARTED_FILE
from cachekd_cli.demo import new_folder
from cachekd_cli.main import app
from launch import Command
from tiny import evaluated, tar_members, write_tar

KILLS = int(os.environ.get("CACHEKD_KILLS", "3"))
HOLDS = """
import sys, time
from pathlib import Path
from cachekd.lock import alone
{before}
with alone(Path(sys.argv[1]), "trains in"):
    print("held", flush=True)
    time.sleep(600)
"""
NO_FLOCK = """
import errno, fcntl
def refuse(*_):
    raise OSError(errno.ENOLCK, "no locks here")
fcntl.flock = refuse
"""


def elsewhere(call: Any, *args: Any, **settings: Any) -> Any:
    """In another thread: a lock of one's own is no obstacle."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *args, **settings).result()


def holder(folder: Path, before: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS.format(before=before), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def training(student: Path, data: Path, out: Path, **changes: Any) -> TrainConfig:
    settings = {"batch_size": 2, "gradient_accumulation": 2, "save_steps": 1, "logging_steps": 1}
    settings |= {"lambda_align": 0, "lambda_vsd": 0, "training": {"max_steps": 4}}
    return TrainConfig(student=str(student), data=str(data), out=out, **settings | changes)


@pytest.fixture
def data(tmp_path) -> Path:
    write_tar(tmp_path / "data" / "0.tar", tar_members(30))
    return tmp_path / "data"


class At(TrainerCallback):
    """Does something in the middle of a step."""

    def __init__(self, step: int, then: Any) -> None:
        self.step, self.then = step, then

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.then()


def cut_short() -> None:
    raise KeyboardInterrupt


# ---- the lock


def test_who_holds_it_is_said_and_the_dead_hold_nothing(tmp_path):
    folder = tmp_path / "new" / "run"
    process = holder(folder)
    with (
        pytest.raises(CachekdError, match="another process trains in this folder") as caught,
        alone(folder, "trains in"),
    ):
        pass
    assert f"process {process.pid} on {socket.gethostname()}, since 20" in str(caught.value.found)
    assert entries(folder) == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    with alone(folder, "trains in"):
        assert json.loads((folder / LOCK_FILE).read_text())["process"] == os.getpid()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP])
def test_without_flock_there_is_a_lease(tmp_path, monkeypatch, number):
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    # Of the errors that mean the same, one shows that the lease is renewed: it takes its time.
    lease, slept = (1.0, 1.5) if number == errno.ENOLCK else (0.3, 0.0)
    monkeypatch.setattr(locks, "_LEASE", lease)
    monkeypatch.setattr(locks, "_GRACE", 0.2)
    with alone(tmp_path / "run", "trains in"):
        time.sleep(slept)  # longer than the lease
        assert (tmp_path / "run" / LEASE_FILE).exists()
        with pytest.raises(CachekdError, match=f"process {os.getpid()} on"):
            elsewhere(enter, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_where_no_file_can_be_made_nobody_is_blamed():
    with pytest.raises(CachekdError, match="cannot be written"):
        enter(Path("/proc"))


def enter(folder: Path) -> None:
    with alone(folder, "trains in"):
        pass


def test_a_lease_of_the_dead_ends(tmp_path, monkeypatch):
    process = holder(tmp_path, NO_FLOCK)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LEASE_FILE).exists()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    enter(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_made_goes_if_it_stays_empty(tmp_path):
    with pytest.raises(ZeroDivisionError), alone(tmp_path / "a" / "b", "trains in"):
        _ = 1 / 0
    assert not (tmp_path / "a").exists()
    with alone(tmp_path / "a" / "b", "trains in"):
        (tmp_path / "a" / "b" / "thing").touch()
    assert entries(tmp_path / "a" / "b") == [tmp_path / "a" / "b" / "thing"]


# ---- training


def test_a_second_training_is_refused_and_changes_nothing(tmp_path, student_path, data):
    config = training(student_path, data, tmp_path / "run")
    told: list[str] = []

    def begin_another() -> None:
        before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
        for other in (config, config.model_copy(update={"learning_rate": 1e-3})):
            with pytest.raises(CachekdError, match="another process trains in this folder") as caught:
                elsewhere(train, other)
            told.append(str(caught.value))
        assert {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()} == before

    train(config, [At(2, begin_another)])
    assert [f"process {os.getpid()} on" in text for text in told] == [True, True]
    assert not (config.out / LOCK_FILE).exists()
    run = json.loads((config.out / RUN_FILE).read_text())
    assert run["config"]["learning_rate"] == config.learning_rate
    with pytest.raises(CachekdError, match="the run is finished"):
        train(config)


def test_a_folder_in_which_another_run_has_just_begun(tmp_path, student_path, data, monkeypatch):
    """As where two processes have both been given the lock."""
    config = training(student_path, data, tmp_path / "run")
    content = b'{"of": "another"}'

    def begun_meanwhile(*_: Any) -> None:
        (config.out / STARTED_FILE).write_bytes(content)

    monkeypatch.setattr("cachekd.train.run.say_what_is_cut", begun_meanwhile)
    with pytest.raises(CachekdError, match="another run has begun in this folder"):
        train(config)
    assert (config.out / STARTED_FILE).read_bytes() == content


def test_each_checkpoint_says_what_it_was_made_with(tmp_path, student_path, data):
    config = training(student_path, data, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, [At(2, cut_short)])
    noted = config.out / CHECKPOINTS / "checkpoint-2" / SETTINGS_FILE
    settings = json.loads(noted.read_text())
    assert settings["learning_rate"] == config.learning_rate
    noted.write_text(json.dumps(settings | {"learning_rate": 1e-3}))  # a checkpoint of another run, put here
    with pytest.raises(CachekdError, match="other settings") as caught:
        train(config)
    assert (caught.value.where, caught.value.expected) == (str(noted), "learning_rate: 0.001")
    noted.unlink()
    with pytest.raises(CachekdError, match="cannot be read"):
        train(config)
    noted.write_text(json.dumps(settings))
    (config.out / PART).mkdir()
    (config.out / PART / "half.safetensors").touch()  # of a session that was killed while it saved
    assert train(config).resumed_from == 2
    assert not list(config.out.glob("half*"))


@pytest.mark.parametrize("times", [1, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_of_trainings_that_start_together_one_runs(tmp_path, student_path, data, times):
    """With other settings each; the record, the log and the weights are of the one that ran."""
    for _ in range(times):
        out = tmp_path / "run"
        rates = ["1e-3", "2e-3", "3e-3"]
        command = ["train", "--student", student_path, "--data", data, "--out", out]
        command += ["--lambda-align", "0", "--lambda-vsd", "0", "--epochs", "2"]
        processes = {rate: Command(*command, "--learning-rate", rate) for rate in rates}
        told = {rate: process.communicate()[1] for rate, process in processes.items()}
        codes = {rate: process.returncode for rate, process in processes.items()}
        assert sorted(codes.values()) == [0, 2, 2], told
        [ran] = [rate for rate, code in codes.items() if code == 0]
        assert json.loads((out / RUN_FILE).read_text())["config"]["learning_rate"] == float(ran)
        for rate in set(rates) - {ran}:
            assert (
                "another process trains in this folder" in told[rate] or "the run is finished" in told[rate]
            )
        train(training(student_path, data, tmp_path / "alone", **alone_settings(float(ran))))
        student = "model.safetensors"
        assert (out / student).read_bytes() == (tmp_path / "alone" / student).read_bytes()
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / "alone")


def alone_settings(rate: float) -> dict[str, Any]:
    defaults = TrainConfig.model_fields
    names = ("batch_size", "gradient_accumulation", "save_steps", "logging_steps")
    return {name: defaults[name].default for name in names} | {
        "learning_rate": rate,
        "epochs": 2,
        "training": {},
    }


# ---- the same steps in smaller batches


def test_a_run_may_go_on_in_smaller_batches(tmp_path, student_path, data):
    config = training(student_path, data, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, [At(2, cut_short)])
    other = {"batch_size": 1, "gradient_accumulation": 3}
    with pytest.raises(CachekdError, match="other settings") as caught:
        train(config.model_copy(update=other))
    assert caught.value.expected == "batch_size x gradient_accumulation: 4"
    assert caught.value.found == "batch_size x gradient_accumulation: 3"
    assert train(config.model_copy(update={"batch_size": 1, "gradient_accumulation": 4})).resumed_from == 2
    train(training(student_path, data, tmp_path / "whole"))
    here, whole = (losses(tmp_path / name) for name in ("run", "whole"))
    assert len(here) == 4
    assert here == pytest.approx(whole, rel=1e-5)  # the same samples in the same steps


def losses(run: Path) -> list[float]:
    log = json.loads((run / RUN_FILE).read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_what_is_dropped_of_an_epoch_depends_on_the_batch(tmp_path, student_path, data):
    config = training(student_path, data, tmp_path / "run", training={"dataloader_drop_last": True})
    with pytest.raises(KeyboardInterrupt):
        train(config, [At(1, cut_short)])
    with pytest.raises(CachekdError, match="other settings"):
        train(config.model_copy(update={"batch_size": 1, "gradient_accumulation": 4}))


# ---- everything else that fills a folder


def test_a_dump_that_joins_another_takes_its_shards(tmp_path, teacher_path, data, monkeypatch):
    settings = {"teacher": str(teacher_path), "data": str(data), "out": tmp_path / "c", "tail": "none"}
    first = DumpConfig(**settings, shard_samples=10)
    dump(first)
    before = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}
    second = DumpConfig(**settings, shard_samples=5)
    looks = [None]  # the second looked before the first had written its plan
    monkeypatch.setattr("cachekd.dump.run.find_plan", lambda _: looks.pop())
    with pytest.raises(CachekdError, match="different setting shard_samples") as caught:
        dump(second)
    assert (caught.value.expected, caught.value.found) == (
        "setting shard_samples 10",
        "setting shard_samples 5",
    )
    assert {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()} == before


def test_two_evaluations_of_a_run_lose_nothing(tmp_path, student_path, teacher_path, data):
    train(training(student_path, data, tmp_path / "run"))
    run = str(tmp_path / "run")
    results = [evaluated([run], data), evaluated([run], data, blind=False, teacher=str(teacher_path))]
    folder = tmp_path / "run" / EVALUATIONS_FOLDER
    with ThreadPoolExecutor(2) as pool:
        with alone(folder, "saves scores in"):
            waiting = [pool.submit(save_in_runs, result) for result in results]
            time.sleep(0.2)
            assert not any(future.done() for future in waiting)
        for future in waiting:
            future.result()
    [record] = read_scores(tmp_path / "run")
    assert record.models[0].blind is not None
    assert record.teacher is not None


def test_scores_for_one_folder_are_found_one_after_the_other(tmp_path, student_path, data):
    with alone(tmp_path / "scores", "writes scores into"):
        command = ["eval", str(student_path), "--data", str(data), "--out", str(tmp_path / "scores")]
        result = elsewhere(CliRunner().invoke, app, command)
    assert isinstance(result.exception, CachekdError)
    assert "another process writes scores into this folder" in str(result.exception)


@pytest.mark.parametrize("there", [False, True])
def test_of_two_that_make_a_folder_the_second_is_refused(tmp_path, there):
    out = tmp_path / "new"
    if there:
        out.mkdir()
    with pytest.raises(CachekdError, match=r"already holds something|cannot be written[\s\S]*not empty"):
        make(out, "second", meanwhile=lambda: make(out, "first"))
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a": "first", "z": "first"}
    assert entries(tmp_path) == [out]


def test_a_failed_write_is_said_of_the_folder_that_was_asked_for(tmp_path):
    with (
        pytest.raises(FailedWrite, match="No space left") as caught,
        staged_folder(tmp_path / "new", "cache", last="z") as folder,
    ):
        raise cannot_write(folder / "shards" / "0", OSError(28, "No space left on device"))
    assert caught.value.where == str(tmp_path / "new" / "shards" / "0")
    assert entries(tmp_path) == []


def make(out: Path, what: str, meanwhile: Any = lambda: None) -> None:
    with staged_folder(out, "cache", last="z") as folder:
        (folder / "a").write_text(what)
        (folder / "z").write_text(what)
        meanwhile()


@pytest.mark.parametrize("name", ["new", "new[1]"])
def test_what_the_killed_were_making_is_removed_by_the_next(tmp_path, name):
    child = os.fork()
    if not child:
        with staged_folder(tmp_path / name, "cache", last="z") as folder:
            (folder / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [path.name.startswith(f".{name}.tmp-") for path in entries(tmp_path)] == [True]
    make(tmp_path / name, "whole")
    assert entries(tmp_path) == [tmp_path / name]


def test_demos_that_start_together_have_a_folder_each(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(new_folder, [tmp_path / "runs" / "demo"] * 4))
    assert sorted(path.name for path in made) == ["demo", "demo-2", "demo-3", "demo-4"]
