"""A run that is stopped, fails, or is finished: what is left, and what the same command does next."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ProcessorMixin, TrainerCallback
from typer.testing import CliRunner

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.paths import RUN_FILE
from cachekd.train import train
from cachekd.train.callbacks import RunStopped, StopInOrder
from cachekd.train.folder import CHECKPOINTS, STARTED_FILE
from cachekd_cli.main import app
from cachekd_cli.signals import noting_the_first
from launch import Command
from tiny import tar_members, write_tar


@pytest.fixture
def plain(settings) -> dict[str, Any]:
    """L_CE alone: quick."""
    return settings | {"lambda_align": 0.0, "lambda_vsd": 0.0, "cache": None, "teacher": None}


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} if out.exists() else set()


class AfterStep:
    """Asked to stop, from a step on."""

    def __init__(self, step: int, reason: int = signal.SIGTERM) -> None:
        self.left, self.reason = step, reason

    def __call__(self) -> int:
        self.left -= 1
        return self.reason if self.left <= 0 else 0


# ---- what a failure leaves


def full_disk(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("full_at", ["processor", "run's file"])
def test_a_trained_student_is_never_removed(plain, monkeypatch, full_at):
    """The disk is full after the weights were written."""
    config = TrainConfig(**plain, save_steps=0)
    weights = config.out / "model.safetensors"
    if full_at == "run's file":
        from cachekd.train.folder import commit

        def fill(path: Path, content: bytes) -> None:
            (full_disk if path.name == RUN_FILE else commit)(path, content)

        monkeypatch.setattr("cachekd.train.folder.commit", fill)
    else:
        monkeypatch.setattr("transformers.ProcessorMixin.save_pretrained", full_disk)
    with pytest.raises(CachekdError, match="is trained, but the run could not be finished") as caught:
        train(config)
    assert "No space left" in str(caught.value)
    assert f"model.safetensors in {config.out}" in str(caught.value)
    before = weights.read_bytes()
    monkeypatch.undo()
    with pytest.raises(CachekdError, match="no checkpoint to finish it from") as caught:
        train(config)
    assert "model.safetensors" in str(caught.value)
    assert weights.read_bytes() == before


def test_with_a_checkpoint_it_is_finished_without_another_step(plain, monkeypatch):
    config = TrainConfig(**plain)
    whole = ProcessorMixin.save_pretrained

    def fill(processor: ProcessorMixin, folder: Path) -> object:  # checkpoints have one too
        return (full_disk if Path(folder) == config.out else whole)(processor, folder)

    monkeypatch.setattr("transformers.ProcessorMixin.save_pretrained", fill)
    with pytest.raises(CachekdError, match="could not be finished") as caught:
        train(config)
    assert "the same command goes on from step 6" in str(caught.value)
    monkeypatch.undo()
    summary = train(config)
    assert (summary.resumed_from, summary.steps) == (6, 6)
    assert len(losses_of(config.out)) == 6


def losses_of(out: Path) -> list[float]:
    log = json.loads((out / RUN_FILE).read_text())["log"]
    return [entry["loss"] for entry in log if "ce" in entry]


def test_an_interrupt_while_the_student_is_saved_keeps_it(plain, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cachekd.train.folder.RunFolder.finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**plain, save_steps=0))
    assert {"model.safetensors", STARTED_FILE} <= names(plain["out"])


@pytest.mark.parametrize("there", [False, True])
def test_a_first_sample_that_cannot_be_read_leaves_nothing(plain, tmp_path, there):
    data = tmp_path / "data"
    write_tar(data / "0.tar", tar_members(6))
    config = TrainConfig(**plain | {"data": str(data), "out": tmp_path / "some" / "runs" / "one"})
    if there:
        config.out.mkdir(parents=True)
    members = tar_members(6)
    members[0] = (members[0][0], b"no image")
    write_tar(data / "0.tar", members)
    with pytest.raises(CachekdError):
        train(config)
    assert config.out.exists() == (tmp_path / "some").exists() == there
    assert names(config.out) == set()
    write_tar(data / "0.tar", tar_members(6))
    assert train(config).steps == 4


def test_a_checkpoint_that_was_not_whole_is_not_worth_keeping(plain):
    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                (Path(args.output_dir) / "checkpoint-1").mkdir()
                (Path(args.output_dir) / "checkpoint-1" / "model.safetensors").write_text("half")
                full_disk()

    with pytest.raises(CachekdError, match=r"the disk is full[\s\S]*No space left[\s\S]*begins anew"):
        train(TrainConfig(**plain), [Full()])
    assert not plain["out"].exists()


def test_what_others_put_into_the_folder_stays(plain):
    class Watcher(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            (plain["out"] / "thesis.tex").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**plain), [Watcher()])
    assert names(plain["out"]) == {"thesis.tex"}


# ---- a run of no steps


def test_a_run_of_no_steps_is_refused(plain):
    dropping = plain | {"training": {"dataloader_drop_last": True}}
    with pytest.raises(CachekdError, match="would have no steps") as caught:
        train(TrainConfig(**dropping | {"batch_size": 13}))
    assert "--batch-size 12" in str(caught.value)
    assert not plain["out"].exists()
    assert train(TrainConfig(**dropping | {"batch_size": 12})).steps == 2


# ---- stopped in order


@pytest.mark.parametrize("save_steps", [0, 2])
def test_a_run_that_is_asked_to_stop_goes_on_as_if_it_had_not_been(plain, tmp_path, save_steps):
    whole = TrainConfig(**plain | {"out": tmp_path / "whole"})
    train(whole)
    config = TrainConfig(**plain, save_steps=save_steps)
    with pytest.raises(RunStopped, match="stopped at step 3 of 6") as caught:
        train(config, asked_to_stop=AfterStep(3))
    assert caught.value.reason == signal.SIGTERM
    assert RUN_FILE not in names(config.out)
    assert train(config).resumed_from == 3
    assert losses_of(config.out) == losses_of(whole.out)
    a, b = ((out / "model.safetensors").read_bytes() for out in (config.out, whole.out))
    assert a == b


def test_asked_in_its_last_step_a_run_is_finished(plain):
    assert train(TrainConfig(**plain), asked_to_stop=AfterStep(6)).steps == 6
    assert RUN_FILE in names(plain["out"])


def options_of(settings: dict[str, Any]) -> list[str]:
    given = {name: value for name, value in settings.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_where_it_stopped_and_how_to_go_on(plain, monkeypatch, number):
    send_before_step(monkeypatch, 2, number)
    done = CliRunner().invoke(app, ["train", *options_of(plain)])
    assert done.exit_code == 128 + number
    assert "stopped at step 3 of 6: the same command goes on from step 3\n" in done.stderr
    monkeypatch.undo()
    done = CliRunner().invoke(app, ["train", "--json", *options_of(plain)])
    assert json.loads(done.stdout)["resumed_from"] == 3


def test_a_second_signal_stops_at_once(plain, monkeypatch):
    send_before_step(monkeypatch, 2, signal.SIGINT, signal.SIGTERM)
    done = CliRunner().invoke(app, ["train", *options_of(plain)])
    assert done.exit_code == 128 + signal.SIGTERM
    assert "stopped: there was no checkpoint yet" in done.stderr
    assert not plain["out"].exists()


@pytest.mark.parametrize(
    ("launched", "number"), [(True, signal.SIGTERM), (True, signal.SIGINT), (False, signal.SIGTERM)]
)
def test_a_signal_that_comes_twice_is_the_same_one(monkeypatch, launched, number):
    """A launcher passes on what its job has had; `timeout` signals its process, and then the group of it."""
    monkeypatch.setenv("LOCAL_RANK", "0") if launched else monkeypatch.delenv("LOCAL_RANK", raising=False)

    def twice_and_later(asked: Callable[[], int]) -> None:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert asked() == number
        monkeypatch.setattr("cachekd_cli.signals.PASSED_ON", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt), noting_the_first(lambda: True, lambda: None) as asked:
        twice_and_later(asked)


def test_a_signal_while_models_load_stops_at_once(plain, monkeypatch):
    monkeypatch.setattr("cachekd.train.open.load_student", lambda *_: signal.raise_signal(signal.SIGTERM))
    done = CliRunner().invoke(app, ["train", *options_of(plain)])
    assert done.exit_code == 128 + signal.SIGTERM
    assert not plain["out"].exists()


def test_a_signal_while_the_student_is_saved_lets_the_run_finish(plain, monkeypatch):
    from cachekd.train import run as module

    save = module.save_run
    monkeypatch.setattr(module, "save_run", lambda *run: (signal.raise_signal(signal.SIGINT), save(*run)))
    done = CliRunner().invoke(app, ["train", *options_of(plain)])
    assert done.exit_code == 128 + signal.SIGINT
    assert "the run is finished" in done.stderr
    assert RUN_FILE in names(plain["out"])


def test_a_stopped_step_of_a_pipeline_is_gone_on_with(plain, tmp_path, monkeypatch):
    steps = [{"step": "train", "name": name, "stage": "sft"} for name in ("one", "two")]
    train_settings = {name: plain[name] for name in ("batch_size", "epochs", "logging_steps")}
    defaults = {"student": plain["student"], "data": plain["data"], "train": train_settings}
    file = tmp_path / "pipeline.yaml"
    file.write_text(json.dumps({"out": str(tmp_path / "all"), "defaults": defaults, "steps": steps}))
    send_before_step(monkeypatch, 2, signal.SIGTERM)
    done = CliRunner().invoke(app, ["run", str(file)])
    assert done.exit_code == 128 + signal.SIGTERM
    assert "stopped at step 3 of 6: the same command goes on from here" in done.stderr
    monkeypatch.undo()
    shown = CliRunner().invoke(app, ["run", str(file), "--status", "--json"])
    assert [step["state"] for step in json.loads(shown.stdout)] == ["interrupted", "waiting"]
    assert CliRunner().invoke(app, ["run", str(file)]).exit_code == 0
    runs = [json.loads((tmp_path / "all" / name / RUN_FILE).read_text()) for name in ("one", "two")]
    assert [run["resumed_from"] for run in runs] == [3, 0]


def send_before_step(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Signals to this process, in the middle of the step after so many."""

    def send(self, args, state, control, **kwargs):
        if state.global_step == step:
            for number in numbers:
                signal.raise_signal(number)

    monkeypatch.setattr(StopInOrder, "on_step_begin", send)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_and_the_same_command_again(plain, tmp_path, number, workers):
    """Ctrl-C reaches the whole group: with workers, them too."""
    given = {name: value for name, value in plain.items() if value is not None} | {"epochs": 10}
    given |= {"save_steps": 3, "workers": workers}
    process = Command("train", *options_of(given), new_session=True)
    while not (plain["out"] / CHECKPOINTS / "checkpoint-3").exists():
        assert process.poll() is None
        time.sleep(0.02)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    told = process.communicate()[1]
    assert process.returncode == 128 + number, told
    (step,) = re.findall(r"stopped at step (\d+) of 30: the same command goes on from step \1\n", told)
    assert 0 < int(step) < 30
    summary = train(TrainConfig(**given))
    assert summary.resumed_from == int(step)
    train(TrainConfig(**given | {"out": tmp_path / "whole", "save_steps": 0}))
    assert losses_of(plain["out"]) == losses_of(tmp_path / "whole")


# ---- finished


def test_a_finished_run_has_no_checkpoints_unless_they_are_kept(plain, tmp_path):
    pytest.importorskip("tensorboard")
    train(TrainConfig(**plain, save_steps=2, training={"report_to": ["tensorboard"]}))
    assert names(plain["out"] / CHECKPOINTS) == {"runs"}  # TensorBoard's logs
    with pytest.raises(CachekdError, match="never overwritten"):
        train(TrainConfig(**plain, save_steps=2))
    train(TrainConfig(**plain | {"out": tmp_path / "none"}))
    assert CHECKPOINTS not in names(tmp_path / "none")
    kept = plain | {"out": tmp_path / "kept", "keep_checkpoints": True, "save_steps": 2}
    train(TrainConfig(**kept))
    assert names(tmp_path / "kept" / CHECKPOINTS) == {"checkpoint-4", "checkpoint-6"}


# ---- before the first step


def test_what_is_loaded_is_said_in_order(settings):
    phases: list[str] = []
    train(TrainConfig(**settings), phase=phases.append)
    loading = [phase for phase in phases if phase.startswith("load")]
    assert loading == ["loading the teacher", "loading the student"]
    assert phases.index("opening the cache") < phases.index(loading[0])
    assert any("comparing the teacher" in phase for phase in phases[: phases.index(loading[0])])


def test_cheap_refusals_come_before_weights_are_loaded(settings, student_path, monkeypatch):
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("cachekd.train.open.load_teacher", loaded)
    monkeypatch.setattr("cachekd.train.open.load_student", loaded)
    monkeypatch.setattr("cachekd.models.model_files.hash_files", loaded)
    with pytest.raises(CachekdError, match="teacher's configuration"):
        train(TrainConfig(**settings | {"teacher": str(student_path)}))
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    with pytest.raises(CachekdError, match="several GPUs"):
        train(TrainConfig(**settings))
    assert not settings["out"].exists()
