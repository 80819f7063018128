"""The command line as a user meets it: real processes, exit codes, messages, and what is on disk after."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cachekd.config import DumpConfig
from cachekd.config.base import defaults_of
from cachekd.errors import CachekdError
from cachekd_cli.main import PANELS, app
from launch import cachekd
from tiny import save_vlm, tar_members, tiny_processor, write_tar


def test_help_is_fast_and_imports_no_torch():
    code = (
        "import sys, cachekd_cli.main, cachekd; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


COMMANDS = sorted(name for commands in PANELS.values() for name in commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert f"Example: cachekd {command}" in result.output


def test_help_says_each_default_once():
    """typer's own, or in words where None stands for what was not given."""
    for name, command in typer.main.get_command(app).commands.items():
        for option in command.params:
            said = len(re.findall("default", getattr(option, "help", None) or "", re.IGNORECASE))
            assert said <= (option.default in (None, False)), (name, option.name)
    defaults = defaults_of(DumpConfig)
    for option in typer.main.get_command(app).commands["dump"].params:
        default = defaults.get(option.name)
        if option.default is None and default is not None and default is not False:  # a flag is off
            assert re.search("default", option.help, re.IGNORECASE), option.name


def test_the_whole_run(tmp_path, teacher_path, student_path, data_path):
    cache, run, ce = tmp_path / "cache", tmp_path / "run", tmp_path / "ce"
    done = cachekd("dump", "--teacher", teacher_path, "--data", data_path, "--out", cache, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["samples"] == 12
    assert summary["bytes_per_token"] > 0
    assert summary["fidelity"]["max_error"] <= 1 / 16 + 1 / 64 + 1e-3  # the codec's stated bound
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"student: {student_path}\ndata: {data_path}\nlearning_rate: 1e-3\nepochs: 9\n")
    options = ("--config", recipe, "--epochs", 1, "--batch-size", 6)
    done = cachekd("train", *options, "--teacher", teacher_path, "--cache", cache, "--out", run)
    assert done.returncode == 0, done.stderr
    assert "vsd" in done.stdout
    assert json.loads((run / "cachekd_run.json").read_text())["steps"] == 2  # --epochs overrides the file
    done = cachekd("train", *options, "--lambda-align", 0, "--lambda-vsd", 0, "--out", ce)
    assert done.returncode == 0, done.stderr
    done = cachekd("eval", run, ce, "--data", data_path, "--teacher", teacher_path, "--json")
    assert done.returncode == 0, done.stderr
    assert [score["name"] for score in json.loads(done.stdout)["models"]] == [str(run), str(ce)]
    done = cachekd("report", run, "--baseline", ce)
    assert done.returncode == 0, done.stderr
    assert "<html" in (run / "report.html").read_text()


def bad_data(folder: Path, kind: str) -> Path:
    """One data set per way of being wrong."""
    members = tar_members(3)
    folder.mkdir()
    if kind == "empty":
        (folder / "d.json").write_text("[]")
        return folder / "d.json"
    changes = {
        "unreadable image": (2, (members[2][0], b"GIF89a nonsense")),
        "no assistant": (3, (members[3][0], b'{"conversations": [{"from": "human", "value": "hi"}]}')),
        "missing image": (2, ("s001.txt", b"")),
    }
    at, member = changes[kind]
    members[at] = member
    write_tar(folder / "0.tar", members)
    return folder


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "the data set is empty"),
        ("unreadable image", "sample 's001'"),
        ("missing image", "sample 's001'"),
        ("no assistant", "no assistant turn"),
    ],
)
def test_bad_data_is_explained_and_nothing_is_written(tmp_path, teacher_path, kind, says):
    data = bad_data(tmp_path / "data", kind)
    arguments = [
        "dump",
        "--teacher",
        str(teacher_path),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "cache"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, CachekdError)
    assert says in str(result.exception)
    assert str(data) in str(result.exception)
    assert not (tmp_path / "cache").exists()


def test_an_error_is_a_message_on_stderr_and_exit_code_2(tmp_path, teacher_path):
    data = bad_data(tmp_path / "data", "no assistant")
    done = cachekd("dump", "--teacher", teacher_path, "--data", data, "--out", tmp_path / "cache")
    assert done.returncode == 2
    assert "error: the conversation has no assistant turn" in done.stderr
    assert "expected:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()


def test_an_unknown_tail_is_refused_before_anything_is_read(tmp_path, data_path):
    arguments = ["dump", "--teacher", "no/such/model", "--data", str(data_path), "--tail", "bytes"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "cache")])
    assert "unknown tail 'bytes'" in str(result.exception)
    assert not (tmp_path / "cache").exists()


def test_a_min_k_beyond_the_window_is_refused(tmp_path, data_path):
    arguments = ["dump", "--teacher", "no/such/model", "--data", str(data_path), "--min-k", "300"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "cache")])
    assert "'min_k'" in str(result.exception)
    assert "larger than the window, 128" in str(result.exception)


def test_an_image_under_another_name_is_refused(tmp_path, teacher_path):
    record = {
        "id": "words",
        "picture": "0.png",
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}],
    }
    (tmp_path / "d.json").write_text(json.dumps([record]))
    arguments = ["dump", "--teacher", str(teacher_path), "--data", str(tmp_path / "d.json")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "cache")])
    assert "the sample has an image under another name" in str(result.exception)
    assert "'words'" in str(result.exception)


def test_an_unknown_setting_is_named_with_the_known_ones(tmp_path):
    (tmp_path / "run.yaml").write_text("studnet: x\nstudent: y\ndata: d\nout: o\n")
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "run.yaml")])
    assert isinstance(result.exception, CachekdError)
    assert "unknown setting 'studnet'" in str(result.exception)
    assert "student" in result.exception.expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("student: y\ndata: d\n", "setting 'out': field required"),
        ("student: y\ndata: d\nout: o\nepochs: -1\n", "setting 'epochs'"),
        ("{", "cannot be read"),
        ("- a\n", "not a list of"),
    ],
)
def test_a_bad_config_is_explained(tmp_path, text, says):
    (tmp_path / "run.yaml").write_text(text)
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "run.yaml")])
    assert isinstance(result.exception, CachekdError)
    assert says in str(result.exception)


def test_unfit_students_exit_before_anything_is_written(tmp_path, teacher_path, data_path, cache_path):
    wide = save_vlm(tmp_path / "wide", tiny_processor(), vision_width=64)
    other = save_vlm(tmp_path / "other", tiny_processor(corpus=["zebra quagga okapi"] * 9))
    for student, says in ((wide, "vision width"), (other, "different tokenizer")):
        arguments = ["train", "--student", student, "--teacher", teacher_path, "--cache", cache_path]
        arguments += ["--data", data_path, "--out", tmp_path / "run"]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert isinstance(result.exception, CachekdError)
        assert says in str(result.exception)
        assert not (tmp_path / "run").exists()


def test_the_output_of_another_run_is_left_alone(tmp_path, teacher_path, student_path, data_path, cache_path):
    taken = tmp_path / "taken"
    shutil.copytree(cache_path, taken)
    shutil.rmtree(taken / "dump")  # as one that was fetched
    before = sorted((path, path.stat().st_mtime_ns) for path in taken.rglob("*"))
    common = ["--data", data_path, "--teacher", teacher_path, "--out", taken]
    for command in (["dump", *common], ["train", *common, "--student", student_path, "--cache", cache_path]):
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        assert isinstance(result.exception, CachekdError)
        assert "already holds something" in str(result.exception)
    assert sorted((path, path.stat().st_mtime_ns) for path in taken.rglob("*")) == before


def test_no_help_text_has_what_would_be_taken_for_markup():
    """Rich drops words in square brackets without a word."""
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            assert "[" not in (getattr(parameter, "help", None) or ""), (name, parameter.name)
