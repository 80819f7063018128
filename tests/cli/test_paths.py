"""`~` and variables in paths, what is a path at all, and what is said of one that is not there."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from typer.testing import CliRunner

from cachekd.config import Config, DataOptions, EvalConfig, TrainConfig, read_config
from cachekd.config.evaluate import OF_BENCHMARKS
from cachekd.data import open_samples
from cachekd.errors import CachekdError
from cachekd.models import load_config, load_processor, model_content
from cachekd.paths import expanded, is_address, is_hub_data, is_path, takes_path, what_is_there
from cachekd.pipeline import plan_steps, read_pipeline
from cachekd.train.inputs import data_content
from cachekd_cli.main import PANELS, app

COMMANDS = {name: command for commands in PANELS.values() for name, command in commands.items()}


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    """A home, a scratch disk, and a folder to stand in."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


# ---- what is expanded


def test_home_and_variables(tmp_path):
    for text, meant in {
        "~": "home",
        "~/runs/x": "home/runs/x",
        "$SCRATCH/x": "scratch/x",
        "${SCRATCH}x": "scratchx",
        "~/d?split=train": "home/d?split=train",
        "$SCRATCH/train-{000..009}.tar": "scratch/train-{000..009}.tar",
    }.items():
        assert expanded(text) == str(tmp_path / meant)
        assert expanded(expanded(text)) == expanded(text)
        assert expanded(Path(text)) == tmp_path / meant
    assert expanded(["~/a", "b"]) == [str(tmp_path / "home/a"), "b"]


@pytest.mark.parametrize(
    "text",
    [
        "org/name@main",
        "s3://bucket/$NOWHERE/x",
        "train-{000..009}.tar",
        "a~b",
        "x/~",
        "cost$5.json",
        "$",
        "hf://~/x",
    ]
    + ["simplecache::s3://b/${NOWHERE}.tar", "org/name?split=train[:10%]", "", "data/*.tar"],
)
def test_what_is_no_path_and_what_needs_nothing_stays(text):
    assert expanded(text) == text


@pytest.mark.parametrize("text", ["$NOWHERE/x", "a/${NOWHERE}", "${NOWHERE:-x}/y", "$EMPTY/x"])
def test_a_variable_that_is_not_set_is_named(text, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ValueError, match=r"the variable (NOWHERE|NOWHERE:-x|EMPTY) is not set, or empty"):
        expanded(text)
    Path(text).mkdir(parents=True)
    assert expanded(text) == text  # there is such a folder


def test_braces_without_a_name_are_said_to_have_none():
    with pytest.raises(ValueError, match="names no variable"):
        expanded("a/${}")


def test_what_a_variable_holds_is_expanded_too_so_that_twice_changes_nothing(tmp_path, monkeypatch):
    """Options are expanded, and once more as settings; a pipeline's settings twice."""
    monkeypatch.setenv("DATA", "$SCRATCH/data")
    monkeypatch.setenv("RUNS", "~/runs")
    for text, meant in {"$DATA/x": "scratch/data/x", "$RUNS/x": "home/runs/x"}.items():
        assert expanded(text) == str(tmp_path / meant)
        assert DataOptions(data=text).data == str(tmp_path / meant)
    monkeypatch.setenv("BUCKET", "s3://b/$own")
    assert expanded("$BUCKET/x") == "s3://b/$own/x"
    for value in ("$LOOP", "a$LOOP"):
        monkeypatch.setenv("LOOP", value)
        with pytest.raises(ValueError, match="the variable LOOP leads back to itself"):
            expanded("$LOOP/x")


def test_a_user_that_is_none_is_named():
    with pytest.raises(ValueError, match="no user 'nobody-of-this-name'"):
        expanded("~nobody-of-this-name/x")


# ---- every setting and every option

# Settings and options of text that are no paths. A new one has to be named here, or be a `PathOrName`.
OTHER_SETTINGS = {"map", "key", "image_field", "tail", "name"}
OTHER_SETTINGS |= {"lora", "quantization", "teacher_quantization", "student_quantization"}  # others'
OTHER_SETTINGS |= {f"{whose}attn_implementation" for whose in ("", "teacher_", "student_")}
OTHER_SETTINGS |= {"align", "vsd", "loss"}  # names of losses
OTHER_SETTINGS |= {"max_memory", "teacher_max_memory"}
OTHER_SETTINGS |= {"vary", "baseline"}  # paths that vary are their steps' settings: see tests/pipeline
OTHER_SETTINGS |= {"benchmarks"}  # names; of benchmark_data the part behind = is a path: see below
OTHER_SETTINGS |= {"benchmark_data"}
OTHER_SETTINGS |= {"training"}  # of which three fields are paths: see below
OTHER_OPTIONS = {"tail", "match", "filter_", "license", "revision", "shards", "name", "sample_key"}
OTHER_OPTIONS |= {"max_memory", "baseline", "only", "variant", "group", "picture"}


def has(kind: Any, annotation: Any) -> bool:
    return annotation is kind or any(has(kind, part) for part in get_args(annotation))


def all_configs(model: type[Config] = Config) -> set[type[Config]]:
    below = {each for sub in model.__subclasses__() for each in all_configs(sub)}
    return below | ({model} if model is not Config else set())


def test_every_path_among_the_settings_is_expanded(tmp_path):
    for model in all_configs():
        if not model.__module__.startswith("cachekd."):
            continue
        for name, field in model.model_fields.items():
            if not (takes_path(field.annotation) or any(map(takes_path, field.metadata))):
                wrong = has(str, field.annotation) and name not in OTHER_SETTINGS
                assert not wrong, f"{model.__name__}.{name}: is it a path? then a PathOrName"
                continue
            given = ["~/x"] if get_origin(field.annotation) is list else "~/x"
            # The field by itself, with all its validators, and what it does not go without.
            beside = {"benchmarks": ("pope",)} if name in OF_BENCHMARKS else {"data": "d"}
            bare = model.model_construct(**beside)
            made = model.__pydantic_validator__.validate_assignment(bare, name, given)
            found = str(getattr(made, name))
            assert "~" not in found, f"{model.__name__}.{name}: make it a LocalPath"
            assert str(tmp_path / "home/x") in found


def test_the_folder_of_a_benchmark_is_expanded(tmp_path):
    config = EvalConfig(models=["m"], benchmarks="pope", benchmark_data=["pope=~/x", "gqa=$SCRATCH/y"])
    assert config.folders == {"pope": str(tmp_path / "home/x"), "gqa": str(tmp_path / "scratch/y")}
    with pytest.raises(CachekdError, match="NOWHERE is not set"):
        read_config(
            None, EvalConfig, {"models": ["m"], "benchmarks": "pope", "benchmark_data": ["pope=$NOWHERE/x"]}
        )


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_path_among_the_options_is_expanded(command, tmp_path, monkeypatch):
    """Every parameter of text that is no setting (see above) is a path or named above; each path comes to the
    command expanded."""
    by_hand = inspect.signature(inspect.unwrap(COMMANDS[command]), eval_str=True).parameters
    for name, parameter in by_hand.items():
        if has(str, parameter.annotation) and not takes_path(parameter.annotation):
            assert name in OTHER_OPTIONS, "a path? then a PathOrName"
    parameters = inspect.signature(COMMANDS[command], eval_str=True).parameters
    for name, parameter in parameters.items():
        if takes_path(parameter.annotation):
            with pytest.raises(CachekdError, match="NOWHERE is not set"):
                registered(command)(**{**dict.fromkeys(parameters), name: "$NOWHERE/x"})


def registered(command: str) -> Any:
    return next(each.callback for each in app.registered_commands if each.name == command)


# ---- where it goes


def test_what_is_recorded_is_the_same_for_both_ways_to_write_it(tmp_path):
    short = TrainConfig(student="~/s", data="~/d", out="~/o", lambda_align=0, lambda_vsd=0)
    home = tmp_path / "home"
    whole = TrainConfig(student=home / "s", data=home / "d", out=home / "o", lambda_align=0, lambda_vsd=0)
    assert short.model_dump_json() == whole.model_dump_json()
    assert "~" not in short.model_dump_json()


def test_files_of_the_trainer_are_paths_too(tmp_path):
    training = {"deepspeed": "~/ds.json", "run_name": "~$NOWHERE"}
    config = TrainConfig(student="s", data="d", out="o", lambda_align=0, lambda_vsd=0, training=training)
    assert config.training == {"deepspeed": str(tmp_path / "home/ds.json"), "run_name": "~$NOWHERE"}


def test_a_file_of_settings(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("student: $NOWHERE/s\ndata: d\nout: ~/runs/x\ncache: ${NOWHERE}/c\n")
    with pytest.raises(CachekdError) as caught:
        read_config(recipe, TrainConfig, {})
    assert caught.value.problem.count("the variable NOWHERE is not set") == 2
    assert f"{recipe}, line 4" in caught.value.problem


def test_a_pipeline(tmp_path):
    file = tmp_path / "pipeline.yaml"
    steps = [{"step": "dump", "name": "cache"}, {"step": "train", "name": "one", "binding": "~/b.json"}]
    defaults = {"teacher": "~/t", "student": "$SCRATCH/s", "data": "~/d", "image_root": "~/i"}
    file.write_text(json.dumps({"out": "~/p", "defaults": defaults, "steps": steps}))
    dump, train = (step.config for step in plan_steps(read_pipeline(file)))
    home = tmp_path / "home"
    assert (dump.teacher, dump.out, dump.image_root) == (str(home / "t"), home / "p/cache", home / "i")
    assert (train.cache, train.student) == (str(home / "p/cache"), str(tmp_path / "scratch/s"))
    assert train.binding == home / "b.json"


def test_a_run_is_written_where_it_was_meant(tmp_path, student_path, data_path):
    """It made `./~/runs`, with its checkpoints in the real home."""
    from cachekd.train import train

    settings = {"student": student_path, "data": data_path, "epochs": 1, "lambda_align": 0, "lambda_vsd": 0}
    train(TrainConfig(**settings, out="~/runs/x", save_steps=1, keep_checkpoints=True))
    assert (tmp_path / "home/runs/x/cachekd_run.json").is_file()
    assert list((tmp_path / "home/runs/x/checkpoints").iterdir())
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["runs"]
    assert not list(Path.cwd().iterdir())


# ---- what is here is meant here


def test_what_begins_as_a_path_is_one():
    Path("models").mkdir()
    local = ["models/x", "models", "/x", "./x", "../x", "~/x", "."]
    assert [name for name in [*local, "org/name", "name", "model/x"] if is_path(name)] == local


@pytest.mark.parametrize("load", [load_config, load_processor, model_content])
def test_a_model_that_is_not_there_is_said_at_once(load, monkeypatch):
    """The hub was asked for 52 s."""
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)  # asked, it would be an error here
    for name in ("llava-7b", "llava-0.5b"):
        Path("models", name).mkdir(parents=True)
    with pytest.raises(CachekdError, match="there is no such") as caught:
        load("models/lava-7b")
    assert caught.value.fix == "did you mean models/llava-7b?"
    assert caught.value.found == "no 'lava-7b' in models/, which holds llava-7b, llava-0.5b"


def test_data_that_are_not_there_are_said_at_once(monkeypatch):
    monkeypatch.setattr("cachekd.data.sources.hf_load.require_on_hub", None)
    Path("data/train").mkdir(parents=True)
    for name in ("data/trian", "data/trian?split=x"):
        assert not is_hub_data(name)
    with pytest.raises(CachekdError, match="does not exist") as caught:
        open_samples("data/trian")
    assert caught.value.fix == "did you mean data/train?"


@pytest.mark.parametrize(
    "name", ["lmms-lab/LLaVA-v1.5-mix", "org/name", "org/v1.5", "_org/_name", "org/name?split=train"]
)
def test_names_of_the_hub_are_the_same_to_all_who_ask(name, monkeypatch):
    def asked(*_: Any) -> Any:
        raise CachekdError("the hub is asked")

    monkeypatch.setattr("cachekd.data.open._open_hugging_face", asked)
    assert is_hub_data(name)
    with pytest.raises(CachekdError, match="the hub is asked"):
        open_samples(name)
    assert data_content(DataOptions(data=name), {}) is None
    bare = name.partition("?")[0]
    assert (is_address(bare), model_content(bare)) == (True, None)


@pytest.mark.parametrize(
    "name", ["data/x.json", "data/x.tar", "d/x.parquet", "d/*.tar", "-a/b", "a/b/c", "a"]
)
def test_what_looks_like_data_of_this_disk_is_none_of_the_hubs(name):
    assert not is_hub_data(name)


def test_what_is_there_in_the_place_of_a_path(tmp_path):
    Path("a/b").mkdir(parents=True)
    Path("a/file").touch()
    Path("a/link").symlink_to("gone")
    assert what_is_there("a/link/x") == ("a/link is a link to gone, which is not there", None)
    Path("a/link").unlink()
    assert what_is_there("a/c/d/e") == ("no 'c' in a/, which holds b, file", None)
    assert what_is_there("a/fil/x") == ("no 'fil' in a/, which holds file, b", "did you mean a/file?")
    assert what_is_there("a/file/x") == ("a/file is a file", None)
    assert what_is_there("a/b/c") == ("no 'c' in a/b/, which holds nothing", None)
    assert what_is_there("q")[0] == "no 'q' in ./, which holds a"


def test_options_from_a_shell_that_expands_nothing(tmp_path):
    result = CliRunner().invoke(app, ["status", "~/none"])
    assert isinstance(result.exception, CachekdError)
    assert result.exception.where == str(tmp_path / "home/none")
    error = CliRunner().invoke(app, ["pull", "org/name", "$NOWHERE/x"]).exception
    assert isinstance(error, CachekdError)
    assert (error.where, error.found) == ("OUT", "$NOWHERE/x")
