"""Settings in a YAML file: every mistake at once, each with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from cachekd.cache.tail.setting import TAILS
from cachekd.config import DataOptions, DumpConfig, EvalConfig, ReportConfig, TrainConfig, read_config
from cachekd.config.base import YamlFile
from cachekd.config.fields import TAIL_FORMS
from cachekd.errors import CachekdError
from cachekd.pipeline import read_pipeline


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def refused(path: Path | None, options: dict) -> CachekdError:
    with pytest.raises(CachekdError) as caught:
        read_config(path, TrainConfig, dict.fromkeys(TrainConfig.model_fields) | options)
    return caught.value


def test_a_value_is_looked_for_where_it_stands(tmp_path):
    """The command line hands over every option, most of them None."""
    path = written(tmp_path, "student: s\ndata: d\nout: o\nbatch_size: big\n")
    error = refused(path, {})
    assert error.where == f"{path}, line 4"
    assert (error.problem.split(":")[0], error.found) == ("setting 'batch_size'", "big")
    assert refused(path, {"batch_size": "huge"}).where == "the command line"
    assert refused(None, {"student": "s", "data": "d"}).where == "the command line"
    assert refused(written(tmp_path, "student: s\ndata: d\n"), {}).where == str(path)  # `out` is missing


def test_every_mistake_is_shown_and_the_typo_first(tmp_path):
    path = written(tmp_path, "studnet: s\ndata: d\nlearning_rate: -1\nzzz: 1\n")
    error = refused(path, {"out": "o", "temperature": 0})
    lines = error.problem.splitlines()
    assert lines[0] == "5 settings are wrong:"
    assert {line.split("'")[1] for line in lines[1:3]} == {"studnet", "zzz"}
    assert any("unknown setting 'studnet' (did you mean 'student'?)" in line for line in lines)
    assert any("'student': field required" in line for line in lines)
    assert any("'learning_rate'" in line and "-1" in line and str(path) in line for line in lines)
    assert any("'temperature'" in line and "the command line" in line for line in lines)
    assert "learning_rate" in str(error.expected)


@pytest.mark.parametrize("model", [TrainConfig, EvalConfig])
def test_every_mistake_within_a_setting_is_shown(tmp_path, model):
    """Each by its own name, with what may stand there."""
    name = "eval_data" if model is TrainConfig else "prior_data"
    mapping = f"{name}: {{data: v, limt: 3, shufle_seed: 1, key: ''}}\n"
    path = written(tmp_path, "student: s\ndata: d\nout: o\nepoch: 3\n" + mapping)
    if model is EvalConfig:
        path = written(tmp_path, "models: [m]\ndata: d\nout: o\nbatchsize: 3\n" + mapping)
    with pytest.raises(CachekdError) as caught:
        read_config(path, model, {})
    top, *lines = caught.value.problem.splitlines()
    assert top == "4 settings are wrong:"
    for typo, near in (("limt", "limit"), ("shufle_seed", "shuffle_seed")):
        assert sum(f"unknown setting '{name}.{typo}' (did you mean {near!r}?)" in line for line in lines) == 1
    assert any("epochs" in line or "batch_size" in line for line in lines[:3])
    assert f"setting '{name}.key'" in lines[3]
    assert all(f"{path}, line {5 if name in line else 4}" in line for line in lines)


def test_every_mistake_within_a_setting_of_a_pipeline_is_shown(tmp_path):
    text = (
        "out: o\ndefaults: {train: {eval_data: {data: v, limt: 3}}}\nsteps:\n"
        "- {step: train, name: a, eval_data: {data: v, shufle_seed: 1}}\n"
        "- {step: eval, name: b, data: d, prior_data: {data: v, imageroot: i}}\n"
    )
    with pytest.raises(CachekdError) as caught:
        read_pipeline(written(tmp_path, text))
    _, *lines = caught.value.problem.splitlines()
    typos = (
        ("defaults.train.eval_data.limt", "limit", "line 2"),
        ("eval_data.shufle_seed", "shuffle_seed", "line 4, step 'a'"),
        ("prior_data.imageroot", "image_root", "line 5, step 'b'"),
    )
    for line, (name, near, place) in zip(lines, typos, strict=True):
        assert f"unknown setting {name!r} (did you mean {near!r}?)" in line
        assert place in line


@pytest.mark.parametrize(
    ("text", "name", "line", "before"),
    [
        ("student: a\ndata: d\nstudent: b\n", "student", 3, 1),
        ("student: a\ntraining:\n  optim: sgd\n  optim: adafactor\n", "optim", 4, 3),
        ("student: a\nlora: {r: 1, r: 2}\n", "r", 2, 2),
    ],
)
def test_a_name_that_stands_twice_is_refused(tmp_path, text, name, line, before):
    path = written(tmp_path, text)
    for read in (YamlFile.read, read_pipeline):
        with pytest.raises(CachekdError, match="given twice") as caught:
            read(path)
        assert repr(name) in caught.value.problem
        assert caught.value.where == f"{path}, line {line}"
        assert f"line {before}" in str(caught.value.found)


def test_merged_mappings_may_overwrite(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, y: 4}\n"
    assert YamlFile.read(written(tmp_path, text)).values["c"] == {"x": 1, "y": 4}


def test_a_dump_is_read_in_the_same_way(tmp_path):
    path = written(tmp_path, "teacher: t\ndata: d\nout: o\ntopk: 3\n")
    with pytest.raises(CachekdError, match="did you mean 'top_k'"):
        read_config(path, DumpConfig, {"top_k": None})


def test_a_field_of_the_trainer_is_sent_under_training(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: sgd\n")
    with pytest.raises(CachekdError, match="put it under `training`"):
        read_config(path, TrainConfig, {"student": "s", "data": "d", "out": "o"})
    with pytest.raises(CachekdError, match="unknown setting 'optim'") as caught:
        read_config(path, DumpConfig, {"teacher": "t", "data": "d", "out": "o"})
    assert "`training`" not in caught.value.problem


def test_a_slip_of_the_finger_is_told_without_the_trainer(tmp_path, monkeypatch):
    """Importing it takes seconds."""
    monkeypatch.setattr("cachekd.config.base._is_the_trainers", None)
    path = written(tmp_path, "student: s\ndata: d\nout: o\nlearning_rat: 1\n")
    assert "(did you mean 'learning_rate'?)" in refused(path, {}).problem


def test_a_mistyped_tail_is_named_with_its_line(tmp_path):
    path = written(tmp_path, "teacher: t\ndata: d\nout: o\ntail: byte=64\ntop_k: 1\n")
    with pytest.raises(CachekdError) as caught:
        read_config(path, DumpConfig, {})
    _, *lines = caught.value.problem.splitlines()
    assert any("unknown tail 'byte=64', expected none, exact, bytes=64" in line for line in lines)
    assert [line.rpartition(", ")[2] for line in lines] == ["line 5", "line 4"]


def test_a_tail_that_can_be_said_is_one_that_there_is():
    assert TAIL_FORMS.keys() == TAILS.keys()


def test_a_copy_of_settings_is_checked_as_new_ones_are(tmp_path):
    config = TrainConfig(student="s", data="d", out=tmp_path, cache="c", teacher="t", stage="dpt")
    changed = config.model_copy(update={"data": tmp_path / "more", "epochs": 2, "eval_data": "e"})
    assert (changed.data, changed.eval_data) == (str(tmp_path / "more"), DataOptions(data="e"))
    assert changed.eval_steps == 500  # a default that follows from what was changed
    assert changed.model_fields_set == config.model_fields_set | {"data", "epochs", "eval_data"}
    assert config.model_copy() == config
    for wrong in ({"epoch": 2}, {"epochs": 0}, {"trainable": "hat"}):
        with pytest.raises(ValidationError):
            config.model_copy(update=wrong)
    with pytest.raises(CachekdError, match="would have no gradient"):
        config.model_copy(update={"lambda_vsd": 1.0})


def test_what_decides_is_all_that_is_not_free():
    for model in (DumpConfig, TrainConfig, EvalConfig, ReportConfig):
        assert model.model_fields.keys() >= model.FREE
    config = DumpConfig(teacher="t", data="d", out="o", workers=2)
    assert config.deciding() == DumpConfig(teacher="t", data="d", out="p").deciding()
    assert config.deciding() != DumpConfig(teacher="u", data="d", out="o").deciding()
