"""The table of losses: what it says is what the functions take; and what is said wrongly."""

from __future__ import annotations

import inspect
import json

import pytest
from typer.testing import CliRunner

from cachekd.config import TrainConfig, read_config
from cachekd.config.losses import LOSSES, DBiLD, Loss
from cachekd.errors import CachekdError
from cachekd.losses import loss_function
from cachekd_cli.main import app
from caches import ROOT

RUN = {"student": "s", "teacher": "t", "cache": "c", "data": "d", "out": "o"}
each_loss = pytest.mark.parametrize("name", LOSSES)


@each_loss
def test_the_function_takes_what_the_table_says(name):
    parameters = inspect.signature(loss_function(name)).parameters
    settings = LOSSES[name].model_fields.keys() - {"loss"}
    assert settings == parameters.keys() - {"student_logits", "targets", "reduction"}
    for setting, field in LOSSES[name].model_fields.items():
        if setting != "loss" and field.default is not None:
            assert parameters[setting].default == field.default


@each_loss
def test_it_is_said_and_recorded_alike_in_every_way(name, tmp_path):
    file = tmp_path / "run.yaml"
    for said in (name, {"loss": name}, f"{{loss: {name}}}"):
        file.write_text(json.dumps(RUN | {"align": said}))
        config = read_config(file, TrainConfig, {})
        assert config == read_config(None, TrainConfig, RUN | {"align": said})
        assert config.deciding()["align"] == LOSSES[name]().model_dump(mode="json")
        assert config.vsd == DBiLD()
        noted = json.loads(json.dumps(config.deciding()))
        assert TrainConfig(**noted, out="o") == config


@each_loss
def test_help_and_documentation_name_it(name):
    shown = " ".join(CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output.split())
    assert name in shown
    assert f"| `{name}` |" in (ROOT / "docs" / "how-to" / "training.md").read_text()


@pytest.mark.parametrize(
    ("said", "message", "where"),
    [
        ("reverse_lk", r"no such loss, 'reverse_lk' \(did you mean reverse_kl\?\)", 1),
        ({"loss": "dbild", "windw": 3}, r"unknown setting 'align.windw' \(did you mean 'window'\?\)", 3),
        ({"loss": "jsd", "direction": "both"}, "unknown setting 'align.direction'", 3),
        ({"direction": "teacher"}, "a loss needs its name", 1),
        ({"loss": "dbild", "direction": "up"}, "'align.direction': input should be 'both', 'teacher'", 3),
        ({"loss": "jsd", "beta": 1}, "'align.beta': input should be less than 1", 3),
        ({"loss": "bild", "k": 1}, "'align.k': input should be greater than or equal to 2", 3),
        ({"loss": "forward_kl", "temperature": 0}, "'align.temperature': .* greater than 0", 3),
        ({"loss": "dbild", "window": 4, "min_k": 5}, "'align': min_k 5 is more than window 4", 1),
        (7, "no such loss, '7'", 1),
        ([], "no such loss", 1),
    ],
)
def test_what_is_said_wrongly_is_told_with_its_line(tmp_path, said, message, where):
    """`where`: the line, of a setting of its own the second one of it."""
    file = tmp_path / "run.yaml"
    rest = (
        "".join(f"\n  {name}: {json.dumps(value)}" for name, value in said.items())
        if isinstance(said, dict)
        else f" {json.dumps(said)}"
    )
    file.write_text(f"align:{rest}\n" + "".join(f"{name}: {value}\n" for name, value in RUN.items()))
    with pytest.raises(CachekdError, match=message) as caught:
        read_config(file, TrainConfig, {})
    assert caught.value.where == f"{file}, line {where}"


def test_a_pipelines_step_is_told_alike(tmp_path):
    from cachekd.pipeline import read_pipeline

    file = tmp_path / "pipeline.yaml"
    step = {"step": "train", "name": "one", "align": {"loss": "dbild", "windw": 3}, "lambda_vsd": {"end": 1}}
    file.write_text(json.dumps({"out": "o", "steps": [step]}))
    with pytest.raises(CachekdError, match="settings are wrong") as caught:
        read_pipeline(file)
    assert "unknown setting 'align.windw' (did you mean 'window'?)" in caught.value.problem
    assert "setting 'lambda_vsd.start': field required" in caught.value.problem


def test_what_a_loss_does_not_say_is_the_runs():
    config = TrainConfig(
        **RUN, temperature=2, window=16, min_k=4, align={"loss": "dbild", "window": 8}, vsd="mse"
    )
    arguments = {name: loss.arguments(dict(config)) for name, loss in config.losses.items()}
    said = {"direction": "both", "temperature": 2.0, "window": 8, "min_k": 4}
    assert arguments == {"align": said, "vsd": {}}
    with pytest.raises(CachekdError, match="least k of L_Align is more than its window") as caught:
        TrainConfig(**RUN, min_k=9, align={"loss": "dbild", "window": 8})
    assert caught.value.found == 9


def test_a_term_that_is_off_has_no_loss():
    assert TrainConfig(**RUN, lambda_vsd=0, vsd="mse").losses == {"align": DBiLD()}


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (DBiLD(), "dbild"),
        (DBiLD(direction="teacher", temperature=2), "dbild, direction teacher, temperature 2.0"),
    ],
)
def test_it_is_written_for_people(loss: Loss, text: str):
    assert str(loss) == text
